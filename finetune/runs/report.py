"""Gather what the report page of a run shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from finetune.bundle.manifest import Manifest
from finetune.evaluation.diagnose import Diagnosis
from finetune.evaluation.evaluate import Judgement
from finetune.evaluation.folds import POOLED, CrossValidation
from finetune.evaluation.mistakes import confident_mistakes
from finetune.evaluation.predictions import Predictions
from finetune.messages import printable
from finetune.report.run_page import ReportInputs, ShownMistake, write_report
from finetune.runs.outcome import Outcome
from finetune.runs.prepare import Prepared
from finetune.storage.rundir import RunDir
from finetune.training.context import Trained

# The split that a model is judged by comes first: val has chosen its weights.
SHOWN_FIRST = (POOLED, "test_unseen", "test", "val_unseen", "val")
GALLERY_SIZE = 12


def write_run_report(
    prepared: Prepared,
    trained: Trained,
    judgement: Judgement,
    predictions: Mapping[str, Predictions],
    notes: Sequence[str],
    manifest: Manifest,
    outcome: Outcome,
    run: RunDir,
    diagnosis: Diagnosis | None = None,
    folds: CrossValidation | None = None,
) -> None:
    """Write ``report.html`` and its figures into the run folder."""
    resolved, head = prepared.resolved, trained.head
    judged = [split for split in SHOWN_FIRST if split in judgement.evaluations]
    pictured = next((split for split in judged if split in predictions), None)
    inputs = ReportInputs(
        title=f"{resolved.model_name}: {outcome.carried_out} on {resolved.backbone.name}",
        evaluations={split: judgement.evaluations[split] for split in judged},
        folds=folds,
        summary=outcome.summary,
        note=" ".join(notes),
        warnings=resolved.dataset.warnings,
        diagnosis=diagnosis,
        spec=resolved.spec.model_dump(mode="json"),
        sources=resolved.sources,
        resolved=resolved.values(),
        phases=[asdict(phase) for phase in resolved.recipe.phases],
        stage_names={f"stage{stage.index}": stage.name for stage in resolved.backbone.stages},
        images=resolved.dataset.counts,
        cost=outcome.cost,
        frozen=trained.frozen,
        parity=manifest.parity,
        weights=resolved.backbone.weights,
        versions=manifest.versions,
        temperature=judgement.temperature,
        l2_path=[asdict(point) for point in head.path] if head else (),
        l2=head.l2 if head else None,
        mistakes=shown_mistakes(predictions[pictured], prepared) if pictured else (),
        mistakes_of=pictured or "",
    )
    write_report(run, inputs)


def shown_mistakes(predictions: Predictions, prepared: Prepared) -> list[ShownMistake]:
    """Return the mistakes that the model is surest of, with what it saw."""
    sample_of = {sample.id: sample for sample in prepared.dataset.samples}
    shown = []
    for mistake in confident_mistakes(predictions, GALLERY_SIZE):
        sample = sample_of[predictions.ids[mistake.index]]
        shown.append(
            ShownMistake(
                image=sample.decode(prepared.resolved.preprocess.load),
                file=printable(sample.id),
                true=predictions.classes[mistake.true],
                predicted=predictions.classes[mistake.predicted],
                confidence=mistake.confidence,
                true_probability=mistake.true_probability,
            )
        )
    return shown
