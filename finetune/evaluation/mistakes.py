"""The most confident wrong predictions, which show label errors and systematic mistakes first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from finetune.evaluation.predictions import Predictions
from finetune.tasks import task_named


@dataclass(frozen=True)
class Mistake:
    """One wrongly predicted image; `index` is its row in the predictions."""

    index: int
    true: str  # its class, or all of its labels
    predicted: str
    confidence: float  # the probability of the wrong label; the largest where several are wrong
    true_probability: float  # the probability of the true label


def confident_mistakes(predictions: Predictions, limit: int) -> tuple[Mistake, ...]:
    """Return at most `limit` wrong predictions, most confident first, ties in row order."""
    task, rows, classes = task_named(predictions.task), predictions.image_results(), predictions.classes
    confidence, true_probability = task.predicted_and_true_probabilities(rows)
    wrong = rows.score < 1
    order = np.argsort(np.where(wrong, -confidence, np.inf), kind="stable")[: min(limit, int(np.count_nonzero(wrong)))]
    return tuple(
        Mistake(
            index=int(row),
            true=task.label_text(predictions.labels[row], classes),
            predicted=task.prediction_text(rows, int(row), classes),
            confidence=float(confidence[row]),
            true_probability=float(true_probability[row]),
        )
        for row in order
    )
