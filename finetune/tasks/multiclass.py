"""Single-label classification: softmax probabilities, and the most probable class is the prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import InvalidInput
from finetune.metrics import Interval, Metric
from finetune.metrics.accuracy import MACRO_F1, MEAN_PER_CLASS_ACCURACY, TOP1, TOP5
from finetune.metrics.calibration import ECE, ReliabilityBin, reliability_bins
from finetune.metrics.imbalance import are_unequal
from finetune.metrics.likelihood import BRIER, NLL
from finetune.metrics.rows import Rows, image_results, log_softmax
from finetune.metrics.temperature import Temperature, fit_softmax_temperature
from finetune.spec import LOSSES
from finetune.tasks.balance import Balance, ClassWeights, balance_of
from finetune.tasks.task import Logits, Target, Targets, Thresholds


class Multiclass:
    """The task with exactly one label per image."""

    name = "multiclass"
    description = "every image has one label"
    noun = "class"
    losses = LOSSES["multiclass"]
    why_unsmoothed = ""
    needs_every_class = True
    why_no_prediction_sets = ""
    probability_note = ""
    reliability_axes = ("confidence in the given label", "accuracy", "images")
    metrics: Sequence[Metric[Rows]] = (TOP1, TOP5, MACRO_F1, MEAN_PER_CLASS_ACCURACY, NLL, ECE, BRIER)
    headline: Metric[Rows] = TOP1
    mean_score: Metric[Rows] = TOP1

    def leading(self, class_counts: Sequence[int]) -> Metric[Rows]:
        return MEAN_PER_CLASS_ACCURACY if are_unequal(class_counts) else TOP1

    def is_task_of(self, targets: Sequence[Target]) -> bool:
        return all(isinstance(target, int) for target in targets)

    def can_train_on(self, target: Target) -> bool:
        return isinstance(target, int)

    def encode(self, targets: Sequence[Target], n_classes: int) -> NDArray[np.int64]:
        """Return (N,) class indices."""
        several = next((target for target in targets if not isinstance(target, int)), None)
        if several is not None:
            raise InvalidInput(
                f"task multiclass takes exactly one label per image, given {len(several)} for one of them; set task: multilabel"
            )
        return np.array(targets, dtype=np.int64)

    def indicators(self, targets: Targets) -> NDArray[np.float64]:
        return np.asarray(np.eye(int(targets.max()) + 1)[targets], np.float64)

    def strata(self, targets: Targets) -> NDArray[np.int64]:
        return np.asarray(targets, np.int64)

    def probabilities(self, logits: Logits, temperature: float = 1.0) -> NDArray[np.float64]:
        return np.exp(log_softmax(logits.astype(np.float64) / temperature))

    def image_results(self, logits: Logits, targets: Targets, thresholds: Thresholds | None = None) -> Rows:
        return image_results(logits, targets)

    def chance(self, targets: Targets) -> float:
        return float(np.bincount(targets).max() / len(targets))

    def uniform_loss(self, n_classes: int) -> float:
        return math.log(n_classes)

    def learning_curve(self, rows: Rows) -> Mapping[str, float]:
        right = rows.score == 1
        by_class = [right[rows.targets == label].mean() for label in np.unique(rows.targets)]
        return {TOP1.key: float(right.mean()), MEAN_PER_CLASS_ACCURACY.key: float(np.mean(by_class))}

    def class_counts(self, rows: Rows) -> Sequence[tuple[int, int, int]]:
        true, given, correct = rows.confusion.sum(axis=1), rows.confusion.sum(axis=0), np.diagonal(rows.confusion)
        return [(int(t), int(g), int(c)) for t, g, c in zip(true, given, correct, strict=True)]

    def class_precisions(self, rows: Rows) -> Sequence[tuple[float, Interval] | None]:
        return ()

    def predicted_and_true_probabilities(self, rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return rows.confidence, np.exp(-rows.nll)

    def predicted_labels(self, rows: Rows, row: int) -> tuple[int, ...]:
        return (int(rows.predicted[row]),)

    def prediction_text(self, rows: Rows, row: int, classes: Sequence[str]) -> str:
        return classes[int(rows.predicted[row])]

    def facts(self, rows: Rows) -> Mapping[str, float]:
        return {}

    def confusion(self, rows: Rows) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(int(count) for count in row) for row in rows.confusion)

    def reliability_bins(self, rows: Rows) -> tuple[ReliabilityBin, ...]:
        return reliability_bins(rows.confidence, rows.predicted == rows.targets)

    def fit_temperature(self, logits: Logits, targets: Targets) -> Temperature:
        return fit_softmax_temperature(logits, targets)

    def choose_thresholds(self, logits: Logits, targets: Targets) -> None:
        return None

    def default_thresholds(self, n_classes: int) -> None:
        return None

    def probability_thresholds(self, thresholds: Thresholds, temperature: float) -> tuple[float, ...]:
        raise ValueError("where classes exclude each other, the most probable one is given, and none has a threshold")

    def logit_thresholds(self, thresholds: Sequence[float], temperature: float) -> Thresholds:
        raise ValueError("where classes exclude each other, the most probable one is given, and none has a threshold")

    def predict_labels(self, probs: NDArray[np.floating[Any]], thresholds: Sequence[float] | None) -> NDArray[np.int64]:
        return self.ranking(probs)[:1]

    def balance(self, targets: Targets, n_classes: int, class_weights: ClassWeights, logit_adjustment: float) -> Balance:
        return balance_of(targets, n_classes, class_weights, logit_adjustment)

    def label_text(self, target: Any, classes: Sequence[str]) -> str:
        return classes[int(target)]

    def labels_of(self, target: Any) -> tuple[int, ...]:
        return (int(target),)

    def cell_text(self, labels: Sequence[int], classes: Sequence[str]) -> str:
        return classes[labels[0]]

    def ranking(self, probs: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        return np.argsort(-probs, kind="stable")
