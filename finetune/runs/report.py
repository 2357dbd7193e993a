"""Collect the content of a run's report page, and write the page."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict

from finetune.bundle.calibration import Calibration
from finetune.bundle.manifest import Manifest
from finetune.evaluation.calibrate import AccuracyCoverage, accuracy_coverage, reliability_after
from finetune.evaluation.diagnose import Diagnosis
from finetune.evaluation.evaluate import MOST_INDEPENDENT_FIRST, UNSEEN, Evaluation, RunEvaluation
from finetune.evaluation.mistakes import confident_mistakes
from finetune.evaluation.predictions import Predictions
from finetune.messages import printable
from finetune.report.run_page import ReportInputs, ShownMistake, write_report
from finetune.runs.outcome import Outcome
from finetune.runs.prepare import Prepared
from finetune.runs.study_results import StudyResults
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.tasks import task_named
from finetune.training.context import Trained

GALLERY_SIZE = 12


def import_in_background() -> None:
    """Start importing in another thread what comes after training, matplotlib and SciPy: half a second beside training."""

    def load() -> None:
        import scipy.special  # noqa: F401

        import finetune.report.run_figures  # noqa: F401

    threading.Thread(target=load, name="imports").start()


def write_run_report(
    prepared: Prepared,
    trained: Trained,
    evaluation: RunEvaluation,
    predictions: Mapping[str, Predictions],
    manifest: Manifest,
    outcome: Outcome,
    run: RunDir,
    diagnosis: Diagnosis | None,
    carried: StudyResults,
) -> None:
    """Write ``report.html`` and its figures into the run folder.

    Args:
        carried: results of the study that keeps the run, which the page shows instead of the run's own.
    """
    from finetune.report.run_figures import draw_figures  # imports matplotlib, which a run that is only evaluated does not need

    resolved, head = prepared.resolved, trained.head
    evaluated = [split for split in MOST_INDEPENDENT_FIRST if split in evaluation.evaluations]
    pictured = next((split for split in evaluated if split in predictions), None)
    calibration = Calibration.of(manifest.calibration)
    inputs = ReportInputs(
        title=f"{resolved.model_name}: {outcome.carried_out} on {resolved.backbone.name}",
        evaluations={split: evaluation.evaluations[split] for split in evaluated},
        folds=carried.folds,
        summary=outcome.summary,
        note=" ".join(carried.notes),
        warnings=(*outcome.warnings, *carried.warnings),
        diagnosis=diagnosis,
        spec=(carried.spec or resolved.spec).model_dump(mode="json"),
        sources=resolved.sources,
        resolved=resolved.values(),
        phases=[asdict(phase) for phase in resolved.recipe.phases],
        stage_names={f"stage{stage.index}": stage.name for stage in resolved.backbone.stages},
        images=carried.images or resolved.dataset.counts,
        cost={**outcome.cost, **carried.cost},
        frozen=trained.frozen,
        parity=manifest.parity,
        weights=resolved.backbone.weights,
        versions=manifest.versions,
        temperature=evaluation.temperature,
        thresholds=manifest.thresholds,
        after=_after(predictions[pictured], evaluation, calibration) if pictured == evaluated[0] else None,
        curve=_curve(predictions[pictured], evaluation) if pictured == evaluated[0] else None,
        calibration=calibration,
        l2_path=[asdict(point) for point in head.path] if head else (),
        l2=head.l2 if head else None,
        mistakes=shown_mistakes(predictions[pictured], prepared) if pictured else (),
        mistakes_of=pictured or "",
    )
    write_report(run, inputs, draw_figures(read_lines(run.metrics), inputs))


def _after(predictions: Predictions, evaluation: RunEvaluation, calibration: Calibration | None) -> Evaluation | None:
    """Return the evaluation of the calibrated probabilities; None if there is no temperature."""
    if evaluation.temperature is None:
        return None
    fitted_on = calibration.split if calibration else "val"
    split = predictions.split.removesuffix(UNSEEN)
    return reliability_after(predictions, evaluation.temperature.temperature, fitted_on_these=split == fitted_on)


def _curve(predictions: Predictions, evaluation: RunEvaluation) -> AccuracyCoverage | None:
    """Return the accuracy-coverage curve; None for a task whose models cannot abstain."""
    if task_named(predictions.task).why_no_prediction_sets:
        return None
    return accuracy_coverage(predictions, evaluation.temperature.temperature if evaluation.temperature else 1.0)


def shown_mistakes(predictions: Predictions, prepared: Prepared) -> list[ShownMistake]:
    """Return the mistakes with the highest confidence, each with the image as the model receives it."""
    sample_of = {sample.id: sample for sample in prepared.dataset.samples}
    shown = []
    for mistake in confident_mistakes(predictions, GALLERY_SIZE):
        sample = sample_of[predictions.ids[mistake.index]]
        shown.append(
            ShownMistake(
                image=sample.decode(prepared.resolved.preprocess.load),
                file=printable(sample.id),
                true=mistake.true,
                predicted=mistake.predicted,
                confidence=mistake.confidence,
                true_probability=mistake.true_probability,
            )
        )
    return shown
