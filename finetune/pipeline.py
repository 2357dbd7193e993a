"""The whole story of a fine-tuning job, from a request to a registered model: read `run_job` first.

Each step hands one named value to the next. How a step is done is in the package of its name; this module knows only the request,
the run folder and the order of things.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from finetune.bundle.manifest import Manifest, read_manifest
from finetune.bundle.predictor import Predictor
from finetune.bundle.registry import ModelVersion, Registry
from finetune.crossval import FoldAnswer, RunFold, cross_validate
from finetune.errors import FinetuneError
from finetune.evaluate import labels_of
from finetune.evaluation.folds import POOLED
from finetune.evaluation.metrics import confident_mistakes, write_evaluations
from finetune.evaluation.report import ReportInputs, ShownMistake, write_report
from finetune.export import BundleFacts, export_bundle
from finetune.outcome import Outcome
from finetune.plan import Plan, make_plan
from finetune.progress import Progress, ProgressCallback, silent
from finetune.spec import JobSpec
from finetune.storage.files import write_atomic, write_json
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store
from finetune.storage.workspace import Workspace
from finetune.tracking import NoTracker, Tracker, open_run
from finetune.train.auto import train_until_it_stops_paying
from finetune.train.average import copy_state
from finetune.train.methods import Context, Trained, refit, train_classifier
from finetune.verdict import Verdict, judge

REFIT_NOTE = (
    "The weights were fitted once more on train + val with what val had chosen: val figures are those of the model before that, "
    "test figures are those of these weights."
)
TEMPERATURE_NOTE = "The temperature, too, was fitted on what the model before that answers on val."
FOLDS_NOTE = (
    "The cv figures are what to expect of this model: each image was labelled by a fold's model, made in the same way, that had "
    "not seen it; the temperature was fitted on these answers."
)

_LATENCY_ROUNDS = 20


def run_job(
    spec: JobSpec,
    run: RunDir,
    workspace: Workspace,
    progress: ProgressCallback = silent,
    *,
    experiment: str | None = None,
    parent: str | None = None,
    tracked: bool = True,
) -> Outcome:
    """Fine-tune, judge, export and register a model; where `run` was interrupted before, go on from there.

    Args:
        parent: id of the MLflow run that this one is nested in.

    Raises:
        FinetuneError: whatever went wrong, also written to ``error.json`` in the run folder.
        KeyboardInterrupt: the run was asked to stop, and has written a checkpoint.
    """
    with run.held(), _failures_recorded(run):
        if run.outcome.exists():
            return Outcome.read(run)
        began = _Stopwatch()
        progress = _recorded(progress, run)
        write_atomic(run.spec, lambda stream: stream.write(spec.to_yaml().encode()))
        with _tracked(spec, run, workspace, experiment, parent, tracked) as tracker:
            plan = make_plan(spec, workspace, progress, run)
            tracker.connect()  # not before: importing MLflow would hold up the tracing of the network
            _announce(plan, run, tracker)
            folds = (
                cross_validate(plan, run, _run_fold(workspace, experiment, tracker, tracked), progress) if plan.folds else None
            )
            trained, verdict = train_and_judge(plan, run, workspace, progress)
            if folds:
                verdict = verdict.with_folds(folds)
            write_evaluations(run.evaluation, verdict.evaluations, verdict.temperature)
            manifest = export(plan, trained, verdict, run, progress)
            cost = measure_cost(plan, trained, run, began)
            write_report(run, report_inputs(plan, trained, verdict, manifest, cost))
            version = Registry(workspace.models).register(run.bundle, plan.model_name, once=True)
            return finish(plan, trained, verdict, cost, version, run, tracker)


def train_and_judge(plan: Plan, run: RunDir, workspace: Workspace, progress: ProgressCallback) -> tuple[Trained, Verdict]:
    """Train with val to choose on, and measure. Where the model is fitted once more on train and val, val speaks before that
    (of images that a model was trained on it could only flatter it), and test after it."""
    identity = {"spec": plan.spec.digest(), "dataset": plan.dataset.digest}
    context = Context(plan.dataset, plan.augment, run, plan.compute, identity, Store(workspace.cache), plan.exported, progress)
    if not plan.spec.refits:
        trained = train(plan, context)
        return trained, judge(plan, trained, context)
    start = copy_state(plan.classifier)
    trained = train(plan, context)
    before = judge(plan, trained, context, ("val",))
    plan.classifier.load_state_dict(start)
    trained = refit(plan.classifier, trained, context)
    return trained, before.with_test_of(judge(plan, trained, context, ("test",)))


def train(plan: Plan, context: Context) -> Trained:
    """Carry the recipe out on the plan's classifier; for method auto, recipe after recipe while that pays."""
    if len(plan.recipes) == 1:
        return train_classifier(plan.classifier, plan.recipe, context)
    return train_until_it_stops_paying(plan.classifier, plan.recipes, context)


def _run_fold(workspace: Workspace, experiment: str | None, parent: Tracker, tracked: bool) -> RunFold:
    """How a fold is carried out: as a run of its own, nested in `parent`, that ends with being judged."""

    def run_fold(plan: Plan, run: RunDir, name: str, progress: ProgressCallback) -> FoldAnswer:
        nested_in = parent.wait_for_run_id(60)
        with _tracked(plan.spec, run, workspace, experiment, nested_in, tracked, name=name) as tracker:
            tracker.connect()
            _announce(plan, run, tracker)
            trained, verdict = train_and_judge(plan, run, workspace, progress)
            write_evaluations(run.evaluation, verdict.evaluations, verdict.temperature)
            run.metric(trained.n_steps, verdict.metrics)
            return FoldAnswer(verdict.metrics, verdict.logits["test"], trained.summary, tracker.wait_for_run_id(0))

    return run_fold


def export(plan: Plan, trained: Trained, verdict: Verdict, run: RunDir, progress: ProgressCallback) -> Manifest:
    """Write the bundle; one that an interrupted run has already written is complete and stays."""
    if run.bundle.exists():
        return read_manifest(run.bundle)
    facts = BundleFacts(
        name=plan.model_name,
        classes=plan.dataset.classes,
        method={**plan.spec.method.model_dump(mode="json"), **({"notes": notes(plan)} if notes(plan) else {})},
        spec_digest=plan.spec.digest(),
        metrics=verdict.metrics,
        calibration=asdict(verdict.temperature) if verdict.temperature else {},
        frozen=trained.frozen,
    )
    manifest = export_bundle(
        plan.classifier,
        facts,
        plan.dataset.of("val"),
        run.bundle,
        graph=plan.graph,
        quantize=plan.spec.export.quantize,
        training=plan.dataset.of("train"),
        progress=progress,
    )
    if quantization := manifest.model.get("quantization"):
        run.event("quantised" if quantization["kept"] else "not_quantised", quantization["sentence"])
    return manifest


def measure_cost(plan: Plan, trained: Trained, run: RunDir, began: _Stopwatch) -> dict[str, float]:
    """What the run took and what the model takes. Times in seconds, memory and size in bytes, latency of one image in seconds."""
    predictor = Predictor.load(run.bundle)
    image = np.zeros((1, *plan.backbone.preprocess.input_size_px, 3), np.uint8)
    rounds = []
    for _ in range(_LATENCY_ROUNDS):
        started = time.perf_counter()
        predictor.run(image)
        rounds.append(time.perf_counter() - started)
    return {
        "cost/wall_seconds": began.wall_seconds(),
        "cost/cpu_seconds": began.cpu_seconds(),
        "cost/train_seconds": trained.seconds,
        "cost/peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
        "cost/trainable_parameters": float(trained.n_trainable),
        "cost/total_parameters": float(sum(parameter.numel() for parameter in plan.classifier.parameters())),
        "cost/bundle_bytes": float(sum(path.stat().st_size for path in run.bundle.iterdir())),
        "cost/latency_seconds": statistics.median(rounds),
    }


def report_inputs(plan: Plan, trained: Trained, verdict: Verdict, manifest: Manifest, cost: Mapping[str, float]) -> ReportInputs:
    """What the report shows beyond the run's own journal."""
    resolved = plan.to_dict()
    probe = trained.probe
    return ReportInputs(
        title=f"{plan.model_name}: {plan.spec.method.type} on {plan.backbone.name}",
        evaluations={split: verdict.evaluations[split] for split in (POOLED, "val", "test") if split in verdict.evaluations},
        folds=verdict.folds,
        summary=trained.summary,
        note=" ".join(notes(plan)),
        warnings=plan.dataset.warnings,
        spec=resolved["spec"],
        sources=resolved["sources"],
        resolved={
            **{key: value for key, value in resolved["recipe"].items() if key not in ("phases", "sources")},
            "augmentation": plan.augment.name if plan.augments else "none: the head is solved on images as evaluated",
            **{key: resolved[key] for key in ("preprocess", "compute")},
        },
        phases=resolved["recipe"]["phases"],
        stage_names={f"stage{stage.index}": stage.name for stage in plan.backbone.stages},
        images=plan.dataset.counts(),
        cost={name.removeprefix("cost/"): value for name, value in cost.items()},
        frozen=trained.frozen,
        parity=manifest.parity,
        weights=plan.backbone.weights.to_dict(),
        versions=manifest.versions,
        temperature=verdict.temperature,
        l2_path=[asdict(point) for point in probe.path] if probe else (),
        l2=probe.l2 if probe else None,
        mistakes=shown_mistakes(plan, verdict, POOLED if verdict.folds else "val"),
    )


def notes(plan: Plan) -> list[str]:
    """What must be said beside the figures: which weights they are of."""
    if plan.folds:
        return [FOLDS_NOTE, REFIT_NOTE] if plan.spec.refits else [FOLDS_NOTE]
    return [REFIT_NOTE, TEMPERATURE_NOTE] if plan.spec.refits else []


def shown_mistakes(plan: Plan, verdict: Verdict, split: str, limit: int = 12) -> list[ShownMistake]:
    """The mistakes that the model is surest of, with what it saw."""
    samples, logits = verdict.samples[split], verdict.logits[split]
    classes, preprocess = plan.dataset.classes, plan.backbone.preprocess
    return [
        ShownMistake(
            image=samples[mistake.index].decode(preprocess.load),
            file=samples[mistake.index].id,
            true=classes[mistake.true],
            predicted=classes[mistake.predicted],
            confidence=mistake.confidence,
            true_probability=mistake.true_probability,
        )
        for mistake in confident_mistakes(logits, labels_of(samples), limit)
    ]


def finish(
    plan: Plan,
    trained: Trained,
    verdict: Verdict,
    cost: Mapping[str, float],
    version: ModelVersion,
    run: RunDir,
    tracker: Tracker,
) -> Outcome:
    """Write ``outcome.json``, the file that says the run is complete, and tell MLflow."""
    metrics = {**verdict.metrics, **cost}
    run.metric(trained.n_steps, metrics)
    tracker.bundle(plan.model_name, tags={"version": version.version, "method": plan.spec.method.type})
    tracker.params({"trainable_parameters": trained.n_trainable, **trained.frozen})
    run_id = tracker.wait_for_run_id(0)
    outcome = Outcome(
        run=run.root,
        method=plan.spec.method.type,
        model=version.name,
        version=version.version,
        bundle=version.path,
        metrics=metrics,
        summary=trained.summary,
        classes=plan.dataset.classes,
        warnings=plan.dataset.warnings,
        quarantined=len(plan.dataset.bad),
        mlflow_run_id=run_id,
        cross_validation=verdict.folds.to_dict() if verdict.folds else None,
    )
    write_json(run.outcome, outcome.to_dict())
    run.event("succeeded", f"{version.name} version {version.version} is registered", metrics=verdict.metrics)
    return outcome


def _announce(plan: Plan, run: RunDir, tracker: Tracker) -> None:
    """Write down what was resolved, for people, for MLflow and for a resumed run."""
    resolved = plan.to_dict()
    write_json(run.resolved, resolved)
    counts = {split: sum(classes.values()) for split, classes in plan.dataset.counts().items()}
    run.event("planned", f"{len(plan.dataset.classes)} classes, {counts}", bad=len(plan.dataset.bad))
    for warning in plan.dataset.warnings:
        run.event("warning", warning, level="warning")
    tracker.params(
        _flat(
            {"spec": resolved["spec"], "recipe": {k: v for k, v in resolved["recipe"].items() if k not in ("phases", "sources")}}
        )
    )
    tracker.dataset(plan.dataset.name, plan.dataset.digest, plan.dataset.root, {"classes": list(plan.dataset.classes), **counts})
    tracker.tags({"method": plan.spec.method.type, "backbone": plan.backbone.name, "model": plan.model_name})


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            pairs |= _flat(value, f"{prefix}{key}.")
        else:
            pairs[f"{prefix}{key}"] = value
    return pairs


class _Stopwatch:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def wall_seconds(self) -> float:
        return time.perf_counter() - self._wall

    def cpu_seconds(self) -> float:
        return time.process_time() - self._cpu


def _recorded(progress: ProgressCallback, run: RunDir, every_seconds: float = 1.0) -> ProgressCallback:
    """Also keep the latest progress in ``progress.json``, for whoever watches from outside."""
    written_at = 0.0

    def record(update: Progress) -> None:
        nonlocal written_at
        progress(update)
        now = time.monotonic()
        if now - written_at >= every_seconds or update.done == update.total:
            written_at = now
            write_json(run.progress, {**asdict(update), "values": dict(update.values)})

    return record


@contextmanager
def _failures_recorded(run: RunDir) -> Iterator[None]:
    try:
        run.error.unlink(missing_ok=True)
        yield
    except FinetuneError as error:
        problems = [{"where": problem.where, "message": problem.message} for problem in error.problems]
        run.event("failed", error.message, level="error", code=error.code)
        write_json(run.error, {"code": error.code, "message": error.message, "problems": problems})
        raise


@contextmanager
def comparison(experiment: str, name: str, workspace: Workspace) -> Iterator[str | None]:
    """An MLflow run for others to be nested in; yields its id, or None where MLflow does not answer."""
    tracker = open_run(RunDir(workspace.runs / name).create(), workspace=workspace.root, experiment=experiment, name=name)
    try:
        yield tracker.wait_for_run_id(60)
    except BaseException:
        tracker.end("FAILED")
        raise
    tracker.end("FINISHED")


@contextmanager
def _tracked(
    spec: JobSpec, run: RunDir, workspace: Workspace, experiment: str | None, parent: str | None, wanted: bool, name: str = ""
) -> Iterator[Tracker]:
    """An open MLflow run that is closed as what the block came to."""
    if not wanted:
        yield NoTracker()
        return
    name = name or f"{spec.method.type} {spec.model.backbone} seed {spec.seed}"
    dataset = experiment or Path(spec.training_file).absolute().name
    tracker = open_run(run, workspace=workspace.root, experiment=dataset, name=name, parent_run_id=parent, connect=False)
    try:
        yield tracker
    except KeyboardInterrupt:
        tracker.end("KILLED")
        raise
    except BaseException:
        tracker.end("FAILED")
        raise
    tracker.end("FINISHED")
