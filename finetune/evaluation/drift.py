"""Compute the reference of drift monitoring from a table of predictions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation.predictions import Predictions
from finetune.metrics.novelty import Subspace, held_out_distances, known_images
from finetune.monitoring.reference import MAX_IMAGES, MIN_IMAGES, Reference
from finetune.monitoring.statistics import PredictionStatistics, statistics_of
from finetune.runtime.blas import blas_threads_for
from finetune.tasks import task_named


def reference_of(
    predictions: Predictions,
    temperature: float,
    subspace: Subspace | None,
    thresholds: tuple[float, ...] | None = None,
    *,
    fitted_on_these: bool = False,
) -> Reference | None:
    """Compute the reference from predictions for held-out images; None if they are too few or not finite.

    Args:
        temperature: the bundle's; logits are divided by it.
        subspace: of the embeddings of known images; None if the bundle has none, or if the embeddings in the table differ from
            those of the exported model.
        thresholds: (C,) of the probabilities, for a multi-label model.
        fitted_on_these: whether the subspace was fitted to these embeddings. Then distances are measured by cross-fitting, from
            subspaces that were fitted without them.
    """
    if len(predictions) < MIN_IMAGES or not np.isfinite(predictions.logits).all():
        return None
    rows = np.arange(len(predictions))
    if fitted_on_these and subspace is not None and predictions.embedding is not None:
        rows = known_images(len(predictions))  # to which the subspace was fitted
    elif len(predictions) > MAX_IMAGES:
        rows = np.linspace(0, len(predictions) - 1, MAX_IMAGES).round().astype(np.int64)
    kept = predictions.take(rows)
    probs = task_named(kept.task).probabilities(kept.logits, temperature)
    statistics = statistics_of(kept.task, probs, kept.embedding, subspace, thresholds)
    if fitted_on_these and subspace is not None and kept.embedding is not None:
        with blas_threads_for(kept.embedding.size):
            statistics = _with_distances(statistics, held_out_distances(kept.embedding))
    return Reference(kept.split, statistics)


def _with_distances(statistics: PredictionStatistics, distances: NDArray[np.float64]) -> PredictionStatistics:
    return replace(statistics, distance=distances.astype(np.float32))
