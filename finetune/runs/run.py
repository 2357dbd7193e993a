"""Carry out one run, from a request to a registered model. `run_job` shows all steps in order.

Each step returns a named value that the next one takes; the steps themselves are in the imported modules. If a run is
interrupted, call it again with the same folder: it continues from its newest checkpoint, and on a CPU its result is bit-equal to
that of an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.calibration import HELD_OUT
from finetune.bundle.manifest import THRESHOLDS, Manifest, read_manifest
from finetune.bundle.predictor import Seen
from finetune.bundle.registry import Registry
from finetune.data.dataset import Dataset, targets_of
from finetune.data.split import leaked
from finetune.errors import InvalidInput
from finetune.evaluation import predictions as tables
from finetune.evaluation.calibrate import FittedCalibration, check_calibration, fit_calibration
from finetune.evaluation.diagnose import write_diagnosis
from finetune.evaluation.drift import reference_of
from finetune.evaluation.evaluate import MOST_INDEPENDENT_FIRST, POOLED, RunEvaluation, read_evaluation, write_evaluation
from finetune.evaluation.predictions import Predictions
from finetune.events import DataWarning, Finished, Planned, Quantised, Registered
from finetune.export.pack import BundleFacts, export_bundle
from finetune.messages import plural
from finetune.monitoring.reference import Reference
from finetune.progress import Progress, ProgressCallback, silent
from finetune.runs.chance import chance_warning, refuse_diverged, refuse_no_better_than_chance
from finetune.runs.evaluate import (
    apply_thresholds,
    embeddings_match,
    evaluate_splits,
    predict_splits,
    without_training_images,
)
from finetune.runs.learner import Learner
from finetune.runs.model_cost import model_cost
from finetune.runs.options import RunOptions
from finetune.runs.outcome import Outcome
from finetune.runs.prepare import Prepared, augment_of, built_network, decisions_of, prepare
from finetune.runs.preprocessing import check_preprocessing
from finetune.runs.report import import_in_background, write_run_report
from finetune.runs.resolve import DatasetFacts, Resolved
from finetune.runs.shared import Shared
from finetune.runs.solved import SolvedLearner
from finetune.runs.study_results import StudyResults
from finetune.runs.watch import Stopwatch, failures_recorded, recorded
from finetune.spec import JobSpec
from finetune.storage.files import write_atomic, write_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tasks import Task
from finetune.tasks.balance import Balance
from finetune.training.choices import Choices
from finetune.training.context import Trained, TrainingContext
from finetune.training.image_weights import image_weights
from finetune.training.label_doubts import label_doubts_sentence
from finetune.training.near_copies import near_copies_in, near_copies_sentence


def run_job(
    spec: JobSpec,
    run: RunDir,
    shared: Shared,
    progress: ProgressCallback = silent,
    options: RunOptions | None = None,
    carried: StudyResults | None = None,
) -> Outcome:
    """Fine-tune with one method, evaluate, export and register, as far as `options.goal` requires.

    Args:
        options: by default those in the run folder, where a study writes them.
        carried: results of a study that the bundle and the report must contain.

    Raises:
        FinetuneError: the run failed; the error is also written to ``error.json`` in the run folder.
        KeyboardInterrupt: the run was asked to stop, and has written a checkpoint.
    """
    if spec.method.type == "auto":
        raise InvalidInput("method auto is a study of several runs: use finetune.studies.carry_out")
    with run.held(), failures_recorded(run):
        options = options or RunOptions.read(run)
        if (done := finished_outcome(run, options)) is not None:
            return done
        stopwatch = Stopwatch(run)
        progress = recorded(progress, run, stopwatch)
        write_atomic(run.spec, lambda stream: stream.write(spec.to_yaml().encode()))
        options.write(run)

        prepared = prepare(spec, shared, progress, run, options)
        write_json(run.resolved, prepared.resolved.to_dict())
        announce(prepared.resolved.dataset, run, prepared.task)
        context = training_context(prepared, run, shared, progress, options.sample_size)
        check_preprocessing(prepared, run, shared, progress)
        learner = learner_for(prepared, shared)
        if options.reaches("exported"):
            import_in_background()
            learner.begin_reference(prepared.checked_on)
        trained = learner.train(context, _earlier_choices(run, options))
        carried = carried or StudyResults()
        predictions, thresholds = apply_thresholds(
            predict_splits(learner, context, options.judged), _given_thresholds(run, options, carried)
        )
        in_train = overlapping_with_training(prepared.dataset, run)
        evaluation = add_study_evaluation(
            evaluate_splits(predictions, thresholds, in_train, prepared.dataset.class_sizes()), carried.evaluation
        )
        predictions |= without_training_images(predictions, in_train)
        for split, table in predictions.items():
            tables.write(run.predictions_of(split), table)
        write_evaluation(run.evaluation, evaluation)
        diagnosis = write_diagnosis(run, carried.study)
        outcome = outcome_of(prepared.resolved, trained, evaluation, run, stopwatch, options)

        if options.reaches("registered"):
            refuse_if_diverged(prepared.resolved, {**carried.predictions, **predictions})
        if options.reaches("exported"):
            answers = {**carried.predictions, **predictions}
            fitted = calibration_of(learner, context, evaluation, answers, own_val="val" in predictions)
            reference = drift_reference(prepared.task, evaluation, answers, fitted)
            manifest = export(prepared, learner, trained, evaluation, carried, fitted, reference, run, progress)
            cost = {**outcome.cost, **stopwatch.read(), **model_cost(run)}
            outcome = replace(outcome, bundle=run.bundle, cost=cost, summary=carried.summary or outcome.summary)
            write_run_report(prepared, trained, evaluation, answers, manifest, outcome, run, diagnosis, carried)
        if options.reaches("registered"):
            outcome = register(outcome, prepared.resolved, predictions, shared.workspace)
        finish(outcome, run)
        return outcome


def announce(dataset: DatasetFacts, run: RunDir, task: Task) -> None:
    """Record the size of the data and its warnings as events of the run or study."""
    sizes = ", ".join(f"{count:,} {split}" for split, count in dataset.sizes.items())
    message = f"{plural(len(dataset.classes), task.noun)}; images: {sizes}"
    run.record(Planned(message, dict(dataset.sizes), len(dataset.quarantined)))
    for warning in dataset.warnings:
        run.record(DataWarning(warning))


def training_context(
    prepared: Prepared, run: RunDir, shared: Shared, progress: ProgressCallback, sample_size: int | None = None
) -> TrainingContext:
    """Return the inputs that all training of this run shares."""
    resolved = prepared.resolved
    balance, weights = _weighting(prepared)
    return TrainingContext(
        dataset=prepared.dataset,
        task=prepared.task,
        augment=augment_of(resolved, shared.store),
        run=run,
        compute=resolved.compute,
        identity={"spec": resolved.spec.digest(), "dataset": resolved.dataset.digest},
        store=shared.store,
        progress=progress,
        sample_size=sample_size,
        balance=balance,
        image_weights=weights,
    )


def _weighting(prepared: Prepared) -> tuple[Balance, NDArray[np.float64] | None]:
    """Return the class weights, logit offsets or sampling that the request asks for, and the weight of each training image.

    Both are computed from the training images of this run.
    """
    data, dataset = prepared.resolved.spec.data, prepared.dataset
    train, n_classes = dataset.of("train"), len(dataset.classes)
    targets = prepared.task.encode(targets_of(train), n_classes)
    balance = prepared.task.balance(targets, n_classes, data.class_weights, data.logit_adjustment)
    return balance, image_weights(train, dataset.classes, balance.of_steps)


def overlapping_with_training(dataset: Dataset, run: RunDir) -> dict[str, frozenset[str]]:
    """Return, for val and test, the ids of images that are in train too: the same file, a near duplicate, or one of a group."""
    exact, near = leaked(dataset), near_copies_in(run)
    return {split: exact.get(split, frozenset()) | near.get(split, frozenset()) for split in {**exact, **near}}


def _given_thresholds(run: RunDir, options: RunOptions, carried: StudyResults) -> tuple[float, ...] | None:
    """Return the thresholds that the run's study chose, or the run that `options.decided_by` names; None: choose them here."""
    if carried.evaluation is not None:
        return carried.evaluation.thresholds
    if options.decided_by is None:
        return None
    return read_evaluation(RunDir((run.root / options.decided_by).resolve()).evaluation).thresholds


def learner_for(prepared: Prepared, shared: Shared) -> Learner:
    """Return the learner that carries out the resolved recipe; torch is imported only if the recipe takes optimiser steps."""
    resolved = prepared.resolved
    if not resolved.recipe.n_steps:
        return SolvedLearner(prepared)
    from finetune.runs.stepped import SteppedLearner

    return SteppedLearner(built_network(resolved.spec, prepared.dataset, shared), resolved)


def add_study_evaluation(own: RunEvaluation, carried: RunEvaluation | None) -> RunEvaluation:
    """Add to a run's evaluation the study's evaluations of other splits; temperature and thresholds are the study's."""
    if carried is None:
        return own
    return RunEvaluation({**carried.evaluations, **own.evaluations}, carried.temperature, carried.thresholds)


def calibration_of(
    learner: Learner,
    context: TrainingContext,
    evaluation: RunEvaluation,
    answers: Mapping[str, Predictions],
    *,
    own_val: bool,
) -> FittedCalibration | None:
    """Return the calibration for new images, fitted on held-out predictions: those of all folds, else those on val.

    If the model was evaluated on test, the calibration is checked on test.

    Args:
        answers: tables of predictions by split.
        own_val: whether the predictions on val were made by the exported model itself.

    Returns:
        None if there are no held-out predictions, or too few, or if the task is multilabel.
    """
    held_out = answers.get(POOLED, answers.get("val"))
    if held_out is None:
        return None
    temperature = evaluation.temperature.temperature if evaluation.temperature else 1.0
    hold = (own_val and held_out.split == "val") or embeddings_match(learner, context, held_out)
    fitted = fit_calibration(held_out, temperature, embeddings_match=hold)
    if fitted is None or "test" not in answers:
        return fitted
    return replace(fitted, calibration=check_calibration(fitted, answers["test"], temperature))


def _method_facts(resolved: Resolved, carried: StudyResults) -> dict[str, Any]:
    """Return the method with its settings, the weights of the images and the notes, as the bundle records them."""
    return {
        **resolved.spec.method.model_dump(mode="json"),
        **({"image_weights": resolved.weights_text} if resolved.weights_text else {}),
        **({"notes": list(carried.notes)} if carried.notes else {}),
    }


def drift_reference(
    task: Task, evaluation: RunEvaluation, answers: Mapping[str, Predictions], fitted: FittedCalibration | None
) -> Reference | None:
    """Return the reference for live predictions, from the predictions on test, else pooled folds or val; None without these."""
    table = next((answers[split] for split in ("test", POOLED, "val") if split in answers), None)
    if table is None:
        return None
    temperature = evaluation.temperature.temperature if evaluation.temperature else 1.0
    thresholds = _thresholds(task, evaluation).get(THRESHOLDS)
    return reference_of(
        table,
        temperature,
        fitted.subspace if fitted else None,
        None if thresholds is None else tuple(thresholds),
        fitted_on_these=table.split != "test",
    )


def export(
    prepared: Prepared,
    learner: Learner,
    trained: Trained,
    evaluation: RunEvaluation,
    carried: StudyResults,
    fitted: FittedCalibration | None,
    reference: Reference | None,
    run: RunDir,
    progress: ProgressCallback,
) -> Manifest:
    """Write the bundle and return its manifest. A bundle that an interrupted attempt has written is complete and is kept."""
    if run.bundle.exists():
        return read_manifest(run.bundle)
    spec, dataset = prepared.resolved.spec, prepared.dataset
    facts = BundleFacts(
        name=prepared.resolved.model_name,
        task=prepared.task.name,
        classes=dataset.classes,
        method=_method_facts(prepared.resolved, carried),
        spec_digest=spec.digest(),
        metrics={**evaluation.metrics, **(carried.folds.metrics if carried.folds else {})},
        calibration={
            **(asdict(evaluation.temperature) if evaluation.temperature else {}),
            **({HELD_OUT: fitted.calibration.to_dict()} if fitted else {}),
            **_thresholds(prepared.task, evaluation),
        },
        subspace=fitted.subspace if fitted else None,
        reference=reference,
        frozen=trained.frozen,
        seen=Seen.of([s.sha256 for s in dataset.of("train")], [s.sha256 for s in dataset.of("val")]),
    )
    progress(Progress("exporting", 0, 3, "steps", message="writing the ONNX graph"))
    manifest = export_bundle(
        learner.exported(facts.temperature),
        facts,
        prepared.checked_on,
        run.bundle,
        threads=prepared.resolved.compute.threads,
        quantize=spec.export.quantize,
        training=dataset.of("train"),
        progress=progress,
    )
    if quantization := manifest.model.get("quantization"):
        run.record(Quantised(quantization["sentence"], quantization["kept"]))
    return manifest


def _thresholds(task: Task, evaluation: RunEvaluation) -> dict[str, list[float]]:
    """Return the manifest's entry of thresholds on calibrated probabilities, one for each label; empty without thresholds."""
    if evaluation.thresholds is None:
        return {}
    temperature = evaluation.temperature.temperature if evaluation.temperature else 1.0
    return {THRESHOLDS: list(task.probability_thresholds(np.asarray(evaluation.thresholds), temperature))}


def most_independent(predictions: Mapping[str, Predictions]) -> Predictions | None:
    """Return the predictions on the split that is most independent of training (`MOST_INDEPENDENT_FIRST`)."""
    return next((predictions[split] for split in MOST_INDEPENDENT_FIRST if split in predictions), None)


def refuse_if_diverged(resolved: Resolved, predictions: Mapping[str, Predictions]) -> None:
    """Refuse a model whose training diverged, unless the request sets ``export.register_model: always``.

    Raises:
        NoBetterThanChance: training diverged.
    """
    evaluated = most_independent(predictions)
    if evaluated is not None and resolved.spec.export.register_model == "auto":
        refuse_diverged(evaluated)


def register(outcome: Outcome, resolved: Resolved, predictions: Mapping[str, Predictions], workspace: Workspace) -> Outcome:
    """Register the bundle of an outcome as a model version; return the outcome with its name, version and path.

    Args:
        predictions: by split, of images that the model was not trained on; the most independent split is compared with chance.

    Raises:
        NoBetterThanChance: the model is no better than chance, and the request does not set ``export.register_model: always``.
    """
    assert outcome.bundle is not None, "what is registered has been exported"
    warnings, evaluated = outcome.warnings, most_independent(predictions)
    if evaluated is not None:
        if resolved.spec.export.register_model == "auto":
            refuse_no_better_than_chance(evaluated)
        warnings = (*warnings, *filter(None, [chance_warning(evaluated)]))
    answers = RunDir(outcome.run).predictions_of("test")
    version = Registry(workspace.models).register(
        outcome.bundle, resolved.model_name, once=True, predictions=answers if answers.exists() else None
    )
    return replace(outcome, bundle=version.path, model=version.name, version=version.version, warnings=warnings)


def outcome_of(
    resolved: Resolved, trained: Trained, evaluation: RunEvaluation, run: RunDir, stopwatch: Stopwatch, options: RunOptions
) -> Outcome:
    """Return the outcome of a run that is trained and evaluated, but not exported yet."""
    # If only the export was missing, training was not repeated: its cost is in the earlier outcome.
    earlier = Outcome.read(run).cost if run.outcome.exists() else {}
    training = trained.cost.to_dict()
    return Outcome(
        run=run.root,
        method=resolved.spec.method.type,
        carried_out=resolved.recipe.method,
        goal=options.goal,
        metrics=evaluation.metrics,
        cost={
            **stopwatch.read(),
            **{name: earlier.get(name, value) for name, value in training.items()},
            "trainable_parameters": float(trained.n_trainable),
            "total_parameters": float(trained.n_parameters),
        },
        summary=trained.summary,
        classes=resolved.dataset.classes,
        n_train=resolved.dataset.sizes.get("train", 0),
        warnings=(*resolved.dataset.warnings, *near_copies_sentence(run), *label_doubts_sentence(run)),
        quarantined=len(resolved.dataset.quarantined),
        choices=trained.choices.to_dict(),
        frozen=trained.frozen,
    )


def finish(outcome: Outcome, run: RunDir) -> None:
    """Write the final metrics and ``outcome.json``, which marks the run as complete, and record the last event."""
    run.metric(_last_step(run), {**outcome.metrics, **{f"cost/{name}": value for name, value in outcome.cost.items()}})
    outcome.write(run)
    if outcome.model is None:
        run.record(Finished(outcome.summary, outcome.metrics))
    else:
        message = f"{outcome.model} version {outcome.version} is registered"
        run.record(Registered(message, outcome.model, str(outcome.version), outcome.metrics))


def finished_outcome(run: RunDir, options: RunOptions) -> Outcome | None:
    """Return the outcome of an earlier call that reached the goal of `options`; None if there is none."""
    if not run.outcome.exists():
        return None
    done = Outcome.read(run)
    return done if RunOptions(goal=done.goal).reaches(options.goal) else None  # type: ignore[arg-type]


def _earlier_choices(run: RunDir, options: RunOptions) -> Choices | None:
    if options.decided_by is None:
        return None
    return decisions_of(RunDir((run.root / options.decided_by).resolve()))[1]


def _last_step(run: RunDir) -> int:
    return max((int(line["step"]) for line in read_lines(run.metrics)), default=0)
