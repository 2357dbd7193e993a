"""Evaluate a trained model: predict the held-out splits, choose thresholds, fit the temperature, and compute metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.evaluation.evaluate import UNSEEN, RunEvaluation, evaluate
from finetune.evaluation.predictions import Predictions, digests_as_rows
from finetune.metrics.temperature import Temperature
from finetune.runs.learner import Learner
from finetune.tasks import task_named
from finetune.training.context import TrainingContext

MIN_IMAGES_TO_CALIBRATE = 100
N_COMPARED_EMBEDDINGS = 40  # spread evenly over a table, and so over all folds
N_PARTS = 5  # that val is divided into; each part is given labels by thresholds that were chosen on the others


def predict_splits(learner: Learner, context: TrainingContext, splits: Sequence[str]) -> dict[str, Predictions]:
    """Return a table of predictions for each of these splits that has images, as the exported graph computes them."""
    found = {}
    for split in splits:
        samples = context.dataset.of(split)
        if samples:
            logits, embedding = learner.predict(samples, context, split)
            found[split] = predictions_table(context, split, samples, logits, embedding)
    return found


def predictions_table(
    context: TrainingContext,
    split: str,
    samples: tuple[Sample, ...],
    logits: NDArray[np.float32],
    embedding: NDArray[np.float32],
) -> Predictions:
    """Return logits (N, C) and embeddings (N, D) of N samples as a table of predictions."""
    return Predictions(
        split=split,
        task=context.task.name,
        classes=context.dataset.classes,
        ids=tuple(sample.id for sample in samples),
        sha256=digests_as_rows([sample.sha256 for sample in samples]),
        targets=context.targets(samples),
        logits=logits,
        embedding=embedding,
    )


def apply_thresholds(
    predictions: Mapping[str, Predictions], given: tuple[float, ...] | None = None
) -> tuple[dict[str, Predictions], tuple[float, ...] | None]:
    """Add to multilabel predictions the thresholds at which a label is predicted, chosen on val.

    The images of val itself are divided into parts, and each part is given thresholds that were chosen on the other parts, so
    that the metrics on val are not optimistic.

    Args:
        given: thresholds that another run of the study has chosen; by default they are chosen on val.

    Returns:
        The tables, and the thresholds (logits, one for each label); None and unchanged tables if the task has no thresholds or
        nothing to choose them on.
    """
    chosen = given if given is not None else choose_thresholds(predictions["val"]) if "val" in predictions else None
    if chosen is None:
        return dict(predictions), None
    tables = {
        split: cross_fitted_thresholds(table) if split == "val" else table.with_thresholds(np.asarray(chosen))
        for split, table in predictions.items()
    }
    return tables, chosen


def choose_thresholds(table: Predictions) -> tuple[float, ...] | None:
    """Return for each label the logit threshold that suits these held-out predictions best; None for a multiclass task."""
    found = task_named(table.task).choose_thresholds(table.logits, table.labels)
    return None if found is None else tuple(float(one) for one in found)


def cross_fitted_thresholds(table: Predictions) -> Predictions:
    """Return the table with cross-fitted thresholds: each part of its images has those that were chosen on the other parts."""
    part = np.arange(len(table)) % N_PARTS
    rows = np.zeros_like(table.logits)
    for number in range(N_PARTS):
        others = np.flatnonzero(part != number)
        rows[part == number] = choose_thresholds(table.take(others)) or 0.0 if len(others) else 0.0
    return table.with_thresholds(rows)


def evaluate_splits(
    predictions: Mapping[str, Predictions],
    thresholds: tuple[float, ...] | None = None,
    leaked: Mapping[str, frozenset[str]] | None = None,
    class_sizes: Sequence[int] = (),
) -> RunEvaluation:
    """Evaluate every table of predictions, and fit the temperature on val.

    Args:
        thresholds: as `apply_thresholds` returned them; they become part of the result.
        leaked: by split, the ids of its images that are in train too. Such a split is evaluated a second time without them, under
            its name with the suffix ``_unseen``.
        class_sizes: images of each class in all splits together.
    """
    judged = {**predictions, **without_training_images(predictions, leaked or {})}
    evaluations = {split: evaluate(table, class_sizes) for split, table in judged.items()}
    return RunEvaluation(evaluations, fit_temperature(predictions["val"]) if "val" in predictions else None, thresholds)


def without_training_images(
    predictions: Mapping[str, Predictions], leaked: Mapping[str, frozenset[str]]
) -> dict[str, Predictions]:
    """Return the tables of splits without the images that are in the training data too, under names that end in `UNSEEN`.

    There is none of a split that would lose no image, or all. See `evaluate_splits` for `leaked`.
    """
    found = {}
    for split, ids in leaked.items():
        if split in predictions:
            table = predictions[split]
            unseen = np.array([row for row, name in enumerate(table.ids) if name not in ids], dtype=np.int64)
            if 0 < len(unseen) < len(table):
                found[f"{split}{UNSEEN}"] = replace(table.take(unseen), split=f"{split}{UNSEEN}")
    return found


def fit_temperature(predictions: Predictions) -> Temperature | None:
    """Fit the temperature on held-out predictions; return None if they are too few or the best value is out of range."""
    if len(predictions) < MIN_IMAGES_TO_CALIBRATE:
        return None
    temperature = task_named(predictions.task).fit_temperature(predictions.logits, predictions.labels)
    return None if temperature.at_limit else temperature


def embeddings_match(learner: Learner, context: TrainingContext, table: Predictions) -> bool:
    """Return whether the embeddings in a table, which may be another run's, equal those of this model.

    A model of a fold, or the one before a refit, has the same embeddings only if no run has trained the backbone. A sample of the
    images is compared.
    """
    if table.embedding is None or not len(table):
        return False
    rows = np.linspace(0, len(table) - 1, min(N_COMPARED_EMBEDDINGS, len(table))).round().astype(int)
    sample_of = {sample.id: sample for sample in context.dataset.samples}
    if any(table.ids[row] not in sample_of for row in rows):
        return False
    _, own = learner.predict(tuple(sample_of[table.ids[row]] for row in rows), context, table.split)
    stored = table.embedding[rows]
    return own.shape == stored.shape and bool(np.allclose(own, stored, rtol=1e-2, atol=1e-2 * float(np.abs(stored).max())))
