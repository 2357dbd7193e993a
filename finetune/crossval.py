"""Cross-validation: the whole job once a fold, each time tested on images that had no part in it.

A fold does what the job itself does, from choosing on its own val images to the refit, so that what is measured is the procedure
that makes the final model; nothing that a fold is tested on has chosen anything in it. Folds run one after another, each in a
folder of its own inside the run's (``folds/1`` …), and one that has finished is not run again. They share what depends on none of
them: the checked images, the cache of frozen features, the traced graph. How one fold is trained and judged is the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from finetune.data.dataset import Sample
from finetune.data.split import write_split
from finetune.evaluate import labels_of
from finetune.evaluation.folds import CrossValidation, FoldScore, pool, read_fold, write_fold
from finetune.plan import Plan, replan
from finetune.progress import Progress, ProgressCallback
from finetune.storage.files import write_atomic, write_json
from finetune.storage.rundir import RunDir


@dataclass(frozen=True)
class FoldAnswer:
    """What one fold's job came to."""

    metrics: Mapping[str, float]  # val/… and test/…
    logits: np.ndarray  # (N, C) float32, of its test images in their order
    summary: str
    mlflow_run_id: str | None


RunFold = Callable[[Plan, RunDir, str, ProgressCallback], FoldAnswer]  # (plan, run folder, its name, progress)


@dataclass(frozen=True)
class OutOfFold:
    """The answers to every image of the pool, each from the fold that had not seen it."""

    result: CrossValidation
    logits: np.ndarray  # (N, C) float32
    samples: tuple[Sample, ...]


def cross_validate(plan: Plan, run: RunDir, run_fold: RunFold, progress: ProgressCallback) -> OutOfFold:
    """Carry out every fold of `plan` that has not finished, and judge all their held-out answers together.

    Raises:
        KeyboardInterrupt: asked to stop; the same call goes on where this one was.
    """
    n_folds = len(plan.folds)
    for number, dataset in enumerate(plan.folds, start=1):
        folder = run.fold(number)
        if folder.outcome.exists():
            continue
        write_split(folder.create().split, dataset)
        began, name = time.perf_counter(), f"fold {number} of {n_folds}"
        answer = run_fold(replan(plan, dataset), folder, name, _named(progress, name))
        write_atomic(folder.held_out, lambda stream, logits=answer.logits: np.save(stream, logits))  # type: ignore[misc]
        n_test = len(dataset.of("test"))
        score = FoldScore(
            fold=number,
            n_train=len(dataset.of("train")) + (len(dataset.of("val")) if plan.spec.refits else 0),
            n_test=n_test,
            metrics=answer.metrics,
            summary=answer.summary,
            seconds=time.perf_counter() - began,
            mlflow_run_id=answer.mlflow_run_id,
        )
        write_fold(folder.outcome, score)
        run.event("fold", f"{name}: top1 {answer.metrics['test/top1']:.4f} on the {n_test:,} images held out", fold=number)
    return _together(plan, run)


def _together(plan: Plan, run: RunDir) -> OutOfFold:
    folders = [run.fold(number) for number in range(1, len(plan.folds) + 1)]
    held_out = [dataset.of("test") for dataset in plan.folds]
    logits = [np.load(folder.held_out, allow_pickle=False) for folder in folders]
    pooled = pool(logits, [labels_of(samples) for samples in held_out], plan.dataset.classes)
    result = CrossValidation(tuple(read_fold(folder.outcome) for folder in folders), pooled)
    write_json(run.folds, result.to_dict())
    low, high = result.spreads["top1"].interval
    message = (
        f"{len(folders)} folds: top1 {pooled.top1:.4f} on {pooled.n:,} images, 95 % interval over folds {low:.4f} to {high:.4f}"
    )
    run.event("cross_validated", message, **pooled.metrics("cv"))
    return OutOfFold(result, np.concatenate(logits), tuple(sample for samples in held_out for sample in samples))


def _named(progress: ProgressCallback, name: str) -> ProgressCallback:
    def update(given: Progress) -> None:
        progress(replace(given, message=f"{name}: {given.message or given.phase}"))

    return update
