"""Carry out a request, as one run or as a study of several runs.

Studies are nested: cross-validation contains the refit, the refit contains method ``auto``, and that contains runs of one method.
The folder of a study ends with the same files as that of a run: predictions, ``evaluation.json`` and ``outcome.json``. The run
whose weights are kept is exported last, because its bundle contains results of the whole study.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune.data.dataset import Dataset
from finetune.data.places.opening import check_present
from finetune.data.split import fold_datasets
from finetune.errors import DataChangedError
from finetune.evaluation import predictions as tables
from finetune.evaluation.evaluate import POOLED, RunEvaluation, evaluate, read_evaluation, write_evaluation
from finetune.evaluation.folds import CrossValidation
from finetune.evaluation.predictions import Predictions
from finetune.events import Compared, DataChanged, StudyConcluded
from finetune.messages import plural, printable
from finetune.naming import dataset_name, model_name
from finetune.progress import ProgressCallback, silent
from finetune.runs.evaluate import choose_thresholds, fit_temperature, without_training_images
from finetune.runs.options import RunOptions
from finetune.runs.outcome import Outcome
from finetune.runs.prepare import read_and_build, split_for
from finetune.runs.resolve import DatasetFacts, Resolved, resolve_resize, resolve_task
from finetune.runs.run import announce, finish, finished_outcome, refuse_if_diverged, register, run_job
from finetune.runs.shared import Shared
from finetune.runs.study_results import StudyResults
from finetune.runs.watch import Stopwatch, failures_recorded, recorded
from finetune.spec import JobSpec, load_spec
from finetune.storage.files import read_json, write_atomic, write_json
from finetune.storage.rundir import RunDir, kept_run
from finetune.storage.workspace import Workspace
from finetune.studies.escalate import escalation
from finetune.studies.folds import FINAL, Folds, cross_validation, fold_name, pooled_predictions
from finetune.studies.refit import CHOOSE, REFIT, Refit
from finetune.studies.study import record_kept, run_children
from finetune.training.measurements import pool_neighbours
from finetune.training.near_copies import near_copies_in, near_copies_sentence, pool_near_copies

REFIT_NOTE = (
    "The weights were fitted once more on train + val with what val had chosen: val figures are those of the model before that, "
    "test figures are those of these weights."
)
TEMPERATURE_NOTE = "The temperature, too, was fitted on the answers of the earlier model to val."
FOLDS_NOTE = (
    "The figures of the folds are what to expect of this model: each image was labelled by a fold's model, made in the same way, "
    "that had not seen it; the temperature was fitted on these answers."
)


@dataclass(frozen=True)
class Conclusion:
    """The result of a study, from the results of its children."""

    kept: str  # name of the child whose weights the study keeps
    evaluation: RunEvaluation
    predictions: Mapping[str, Predictions]
    summary: str
    folds: CrossValidation | None = None
    warnings: tuple[str, ...] = ()  # beside those of the kept child
    images: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # of the whole study, by use and class


def fine_tune(
    spec: JobSpec,
    shared: Shared,
    progress: ProgressCallback = silent,
    run_dir: Path | None = None,
    begun: Callable[[RunDir], object] = lambda run: None,
) -> Outcome:
    """Carry out a request in `run_dir`; by default in the folder of an unfinished run of the same request, else in a new folder.

    If the data has changed since the unfinished run began, a new run begins, and a warning in its outcome says so.

    Args:
        begun: is called with the folder of a run before anything is done in it.

    Raises:
        FinetuneError: the run failed; the error is also written to its folder. If the data does not exist, no run begins.
    """
    if run_dir is not None:
        run = RunDir(run_dir.absolute())
        begun(run)
        return carry_out(spec, run, shared, progress)
    check_present(spec.training_file, spec.validation_file, spec.test_file)
    number, why_new = 0, ""
    while True:
        number += 1
        run = _numbered(spec, shared.workspace, number)
        if run.outcome.exists():
            continue
        if why_new:
            run.create().record(DataChanged(why_new))
        begun(run)
        try:
            outcome = carry_out(spec, run, shared, progress)
        except DataChangedError as error:
            if not error.problems:  # not of the revision that the request names, which a new run would not change
                raise
            why_new = (
                f"this is a new run: the data has changed since {printable(run.root)} was interrupted "
                f"({plural(len(error.problems), 'file')}, the first: {error.problems[0]})"
            )
        else:
            return replace(outcome, warnings=(*outcome.warnings, why_new)) if why_new else outcome


def carry_out(
    spec: JobSpec, run: RunDir, shared: Shared, progress: ProgressCallback = silent, options: RunOptions | None = None
) -> Outcome:
    """Carry out a request in the folder `run`; resume it if an earlier call was interrupted.

    Raises:
        FinetuneError: the run failed; the error is also written to ``error.json`` in the folder.
        KeyboardInterrupt: the run was asked to stop; the same call resumes it.
    """
    options = options or RunOptions.read(run)
    if spec.data.folds is not None:
        return _study(spec, run, shared, progress, options, _cross_validate)
    if spec.refits:
        return _study(spec, run, shared, progress, options, _refit)
    if spec.method.type == "auto":
        return _study(spec, run, shared, progress, options, _escalate)
    return run_job(spec, run, shared, progress, options)


RunStudy = Callable[[JobSpec, RunDir, Shared, ProgressCallback, RunOptions], Conclusion]


def _study(
    spec: JobSpec, run: RunDir, shared: Shared, progress: ProgressCallback, options: RunOptions, conduct: RunStudy
) -> Outcome:
    """Run the children, write the study's results, and export and register the kept model as far as `options.goal` requires."""
    with run.held(), failures_recorded(run):
        if (done := finished_outcome(run, options)) is not None:
            return done
        stopwatch = Stopwatch(run)
        progress = recorded(progress, run, stopwatch)
        write_atomic(run.spec, lambda stream: stream.write(spec.to_yaml().encode()))
        options.write(run)
        conclusion = conduct(spec, run, shared, progress, options)
        record_kept(run, conclusion.kept)
        run.record(StudyConcluded(conclusion.summary, conclusion.kept))
        for split, table in conclusion.predictions.items():
            tables.write(run.predictions_of(split), table)
        write_evaluation(run.evaluation, conclusion.evaluation)
        _write_resolved(spec, run)
        outcome = _outcome_of(spec, run, conclusion, stopwatch, options)
        if options.reaches("registered"):
            refuse_if_diverged(Resolved.from_dict(read_json(run.resolved)), conclusion.predictions)
        if options.reaches("exported"):
            exported = _export_kept(spec, run, conclusion, outcome, shared, progress)
            cost = {key: exported.cost[key] for key in ("bundle_bytes", "latency_seconds")}
            outcome = replace(outcome, bundle=exported.bundle, cost={**outcome.cost, **stopwatch.read(), **cost})
            _copy_report(kept_run(run), run)
        if options.reaches("registered") and outcome.bundle is not None:
            resolved = Resolved.from_dict(read_json(run.resolved))
            outcome = register(outcome, resolved, conclusion.predictions, shared.workspace)
        finish(outcome, run)
        return outcome


def _cross_validate(spec: JobSpec, run: RunDir, shared: Shared, progress: ProgressCallback, options: RunOptions) -> Conclusion:
    """Run all folds and the final run; the pooled predictions of the folds evaluate the final model."""
    n_folds = spec.data.folds
    assert n_folds is not None
    dataset, network = read_and_build(spec, shared, progress)
    whole = _split(spec, dataset, run)
    data = spec.data.model_copy(
        # The resize mode depends on all images, so it is resolved once for all folds.
        update={"folds": None, "resize": resolve_resize(spec, whole, network.facts.preprocess).resize}
    )
    hyperparameters = spec.hyperparameters.model_copy(update={"refit": spec.refits})
    of_child = spec.model_copy(update={"data": data, "hyperparameters": hyperparameters})
    datasets = fold_datasets(whole, n_folds, val_fraction=data.val_fraction, seed=data.split_seed)
    outcomes = run_children(Folds(of_child, datasets, whole), run, shared, progress, carry_out)
    pooled = pooled_predictions(run, n_folds)
    tested = [kept_run(run.child(fold_name(number))) for number in range(1, n_folds + 1)]
    pool_near_copies(run, tested)
    pool_neighbours(run, tested)
    found = cross_validation(outcomes, pooled, n_folds)
    final = run.child(FINAL)
    own = read_evaluation(final.evaluation)
    answers = {POOLED: pooled, **without_training_images({POOLED: pooled}, near_copies_in(run))}
    return Conclusion(
        kept=FINAL,
        evaluation=RunEvaluation(
            {**{split: evaluate(table) for split, table in answers.items()}, **own.evaluations},
            fit_temperature(pooled),
            choose_thresholds(pooled),
        ),
        predictions={**answers, **_tables_in(final)},
        summary=outcomes[FINAL].summary,
        folds=found,
        warnings=near_copies_sentence(run),
        images=_images_of_folds(whole, datasets),
    )


def _refit(spec: JobSpec, run: RunDir, shared: Shared, progress: ProgressCallback, options: RunOptions) -> Conclusion:
    """Run the run that makes the choices, then the refit; val metrics are the first one's, test metrics the second one's."""
    dataset, _ = read_and_build(spec, shared, progress)
    whole = _split(spec, dataset, run)
    hyperparameters = spec.hyperparameters.model_copy(update={"refit": False})
    study = Refit(spec.model_copy(update={"hyperparameters": hyperparameters}), run)
    outcomes = run_children(study, run, shared, progress, carry_out)
    chose, refitted = run.child(CHOOSE), run.child(REFIT)
    before, after = read_evaluation(chose.evaluation), read_evaluation(refitted.evaluation)
    return Conclusion(
        kept=REFIT,
        evaluation=RunEvaluation({**before.evaluations, **after.evaluations}, before.temperature, before.thresholds),
        predictions={**_tables_in(chose), **_tables_in(refitted)},
        summary=f"{outcomes[CHOOSE].summary}; then fitted once more on train + val with what val chose",
        images=whole.counts(),
    )


def _escalate(spec: JobSpec, run: RunDir, shared: Shared, progress: ProgressCallback, options: RunOptions) -> Conclusion:
    """Run the candidates of method auto, and keep the best."""
    dataset, network = read_and_build(spec, shared, progress)
    _split(spec, dataset, run)
    study = escalation(spec, len(network.facts.stages), options, run)
    outcomes = run_children(study, run, shared, progress, carry_out)
    n_done = len(outcomes)
    for name, gain in study.gains(n_done):
        run.record(Compared(f"{name} gained {gain}", name, gain.gain, gain.standard_error))
    kept = study.kept(n_done)
    return Conclusion(
        kept=kept,
        evaluation=read_evaluation(run.child(kept).evaluation),
        predictions=_tables_in(run.child(kept)),
        summary=f"auto: {outcomes[kept].summary} ({'; '.join(study.reasons(n_done))})",
    )


def _split(spec: JobSpec, dataset: Dataset, run: RunDir) -> Dataset:
    """Return the dataset with the study's split, and record its size and warnings as events."""
    divided = split_for(spec, dataset, run)
    announce(DatasetFacts.of(divided), run, resolve_task(spec, divided))
    return divided


def _export_kept(
    spec: JobSpec, run: RunDir, conclusion: Conclusion, outcome: Outcome, shared: Shared, progress: ProgressCallback
) -> Outcome:
    """Export the run whose weights are kept, with the results of the whole study in its bundle and report."""
    leaf = kept_run(run)
    carried = StudyResults(
        conclusion.evaluation,
        conclusion.predictions,
        notes_of(spec),
        conclusion.summary,
        conclusion.folds,
        conclusion.warnings,
        spec=spec,
        study=run,
        images=conclusion.images,
        cost=outcome.cost,
    )
    options = replace(RunOptions.read(leaf), goal="exported")
    return run_job(load_spec(leaf.spec), leaf, shared, progress, options, carried)


def notes_of(spec: JobSpec) -> tuple[str, ...]:
    """Return the sentences that say which weights the figures of a request belong to."""
    if spec.data.folds is not None:
        return (FOLDS_NOTE, REFIT_NOTE) if spec.refits else (FOLDS_NOTE,)
    return (REFIT_NOTE, TEMPERATURE_NOTE) if spec.refits else ()


def _outcome_of(spec: JobSpec, run: RunDir, conclusion: Conclusion, stopwatch: Stopwatch, options: RunOptions) -> Outcome:
    """Return the study's outcome: that of the kept child, with the study's metrics and the cost of all children."""
    children = [Outcome.read(run.child(name)) for name in read_json(run.study)["children"]]
    kept = Outcome.read(run.child(conclusion.kept))
    folds = conclusion.folds
    return replace(
        kept,
        run=run.root,
        method=spec.method.type,
        goal=options.goal,
        metrics={**conclusion.evaluation.metrics, **(folds.metrics if folds else {})},
        cost={**kept.cost, **stopwatch.read(), **training_cost([child.cost for child in children])},
        summary=conclusion.summary,
        bundle=None,
        cross_validation=folds.to_dict() if folds else None,
        warnings=(*kept.warnings, *conclusion.warnings),
    )


def _images_of_folds(whole: Dataset, folds: Sequence[Dataset]) -> dict[str, dict[str, int]]:
    """Return the number of images of each class in the whole data and in the part that each fold held out."""
    sizes = dict(zip(whole.classes, whole.class_sizes(), strict=True))
    held_out = {f"held out by fold {number}": fold.counts()["test"] for number, fold in enumerate(folds, 1)}
    return {"images": sizes, **held_out}


def training_cost(children: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the seconds that training all children of a study takes without any cached features.

    The children share their features, so the features count once, with the largest cost that a child has for them.
    """
    found: dict[str, float] = {}
    for kind in ("seconds", "cpu_seconds"):
        features = max(cost[f"feature_{kind}"] for cost in children)
        own = sum(cost[f"train_{kind}"] - cost[f"feature_{kind}"] for cost in children)
        found |= {f"train_{kind}": own + features, f"feature_{kind}": features}
    return found


def _write_resolved(spec: JobSpec, run: RunDir) -> None:
    """Write ``resolved.json`` of the study: the kept run's resolved values, with the study's request."""
    resolved = read_json(kept_run(run).resolved)
    asked = {"spec": spec.model_dump(mode="json"), "spec_digest": spec.digest(), "study": read_json(run.study)}
    write_json(run.resolved, {**resolved, **asked})


def _copy_report(leaf: RunDir, run: RunDir) -> None:
    """Copy report, figures, metrics and diagnosis of the kept run into the study's folder."""
    for source, target in ((leaf.report, run.report), (leaf.metrics, run.metrics), (leaf.diagnosis, run.diagnosis)):
        data = source.read_bytes()
        write_atomic(target, lambda stream, data=data: stream.write(data))  # type: ignore[misc]
    shutil.copytree(leaf.figures, run.figures, dirs_exist_ok=True)


def _tables_in(run: RunDir) -> dict[str, Predictions]:
    return {path.stem: tables.read(path) for path in sorted(run.predictions.glob("*.npz"))}


def _numbered(spec: JobSpec, workspace: Workspace, number: int) -> RunDir:
    """Return the folder of run `number` (from 1) of a request."""
    name = model_name(spec.suffix, dataset_name(spec.training_file))
    stem = f"{name}-{spec.method.type}-{spec.digest()[:8]}"
    return RunDir(workspace.runs / (stem if number == 1 else f"{stem}-{number}"))
