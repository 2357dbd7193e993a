"""The answers that were wrong with the most confidence: what to look at first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from finetune.evaluation.predictions import Predictions
from finetune.metrics.rows import judge_rows


@dataclass(frozen=True)
class Mistake:
    """One image that was labelled wrongly; `index` is its row in the predictions."""

    index: int
    true: int
    predicted: int
    confidence: float  # the probability that the wrong label was given
    true_probability: float


def confident_mistakes(predictions: Predictions, limit: int) -> tuple[Mistake, ...]:
    """Return the wrong answers given with the most confidence, most confident first, ties in row order."""
    rows = judge_rows(predictions.logits, predictions.labels)
    wrong = rows.predicted != rows.targets
    confidence = np.where(wrong, rows.confidence, -1.0)
    order = np.argsort(-confidence, kind="stable")[: min(limit, int(np.count_nonzero(wrong)))]
    return tuple(
        Mistake(int(i), int(rows.targets[i]), int(rows.predicted[i]), float(rows.confidence[i]), math.exp(-rows.nll[i]))
        for i in order
    )
