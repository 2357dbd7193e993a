"""Multi-label classification: any number of labels per image, each given if its sigmoid probability reaches its threshold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.metrics import Interval, Metric
from finetune.metrics.calibration import ReliabilityBin, reliability_bins
from finetune.metrics.imbalance import rarest_label
from finetune.metrics.labels import (
    BRIER,
    ECE,
    EXACT_MATCH,
    MACRO_F1,
    MAP,
    MICRO_F1,
    NLL,
    LabelRows,
    average_precision_interval,
    average_precisions,
    check_labels,
    label_results,
    sigmoid,
)
from finetune.metrics.temperature import Temperature, fit_sigmoid_temperature
from finetune.metrics.thresholds import best_threshold
from finetune.spec import LOSSES
from finetune.tasks.balance import Balance, ClassWeights, balance_of_labels
from finetune.tasks.task import Logits, Target, Targets, Thresholds

NO_LABEL = "(no label)"
_LEAST = 1e-12  # a threshold of 0 or 1 has no finite logit


class Multilabel:
    """The task with any number of labels per image, including none."""

    name = "multilabel"
    description = "images have several labels, or none"
    noun = "label"
    losses = LOSSES["multilabel"]
    why_unsmoothed = "none where an image may have several labels: smoothing raises every absent one"
    needs_every_class = False  # a rare label may be absent from a split, which then does not measure it
    why_no_prediction_sets = "This model gives an image any number of labels, each with a threshold of its own"
    probability_note = "The percentages are of one label of the image, the one that was wrong with the most confidence."
    reliability_axes = ("probability of a label", "share that has it", "answers")
    metrics: Sequence[Metric[LabelRows]] = (MAP, MICRO_F1, MACRO_F1, EXACT_MATCH, NLL, ECE, BRIER)
    headline: Metric[LabelRows] = MAP
    mean_score: Metric[LabelRows] = EXACT_MATCH

    def leading(self, class_counts: Sequence[int]) -> Metric[LabelRows]:
        return self.headline  # a mean over labels already

    def is_task_of(self, targets: Sequence[Target]) -> bool:
        return any(not isinstance(target, int) for target in targets)

    def can_train_on(self, target: Target) -> bool:
        return True

    def encode(self, targets: Sequence[Target], n_classes: int) -> NDArray[np.uint8]:
        """Return (N, C), 1 where a label applies."""
        encoded = np.zeros((len(targets), n_classes), np.uint8)
        for row, target in enumerate(targets):
            encoded[row, [target] if isinstance(target, int) else list(target)] = 1
        return encoded

    def indicators(self, targets: Targets) -> NDArray[np.float64]:
        return np.asarray(targets, np.float64)

    def strata(self, targets: Targets) -> NDArray[np.int64]:
        return rarest_label(targets)

    def probabilities(self, logits: Logits, temperature: float = 1.0) -> NDArray[np.float64]:
        return sigmoid(logits.astype(np.float64) / temperature)

    def image_results(self, logits: Logits, targets: Targets, thresholds: Thresholds | None = None) -> LabelRows:
        return label_results(logits, targets, thresholds)

    def chance(self, targets: Targets) -> float:
        shares = targets.mean(axis=0)
        return float(shares[shares > 0].mean()) if shares.any() else 0.0

    def uniform_loss(self, n_classes: int) -> float:
        return math.log(2.0)

    def learning_curve(self, rows: LabelRows) -> Mapping[str, float]:
        return {MAP.key: MAP.compute(rows)}

    def class_counts(self, rows: LabelRows) -> Sequence[tuple[int, int, int]]:
        return [(int(t), int(g), int(b)) for t, g, b in zip(*rows.counts, strict=True)]

    def class_precisions(self, rows: LabelRows) -> Sequence[tuple[float, Interval] | None]:
        counts, _, _ = rows.counts
        return [
            (float(value), average_precision_interval(float(value), int(n))) if n else None
            for value, n in zip(average_precisions(rows), counts, strict=True)
        ]

    def predicted_and_true_probabilities(self, rows: LabelRows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        said = np.where(rows.given, rows.probs, 1.0 - rows.probs)  # the probability of each binary decision that was made
        surest_mistake = np.where(rows.given != rows.targets, said, 0.0).max(axis=1)
        wrong = rows.score < 1
        return np.where(wrong, surest_mistake, said.min(axis=1)), np.where(wrong, 1.0 - surest_mistake, said.min(axis=1))

    def predicted_labels(self, rows: LabelRows, row: int) -> tuple[int, ...]:
        return self.labels_of(rows.given[row])

    def prediction_text(self, rows: LabelRows, row: int, classes: Sequence[str]) -> str:
        return self.label_text(rows.given[row], classes)

    def facts(self, rows: LabelRows) -> Mapping[str, float]:
        true, given, _ = (int(count.sum()) for count in rows.counts)
        return {"labels_per_image": true / len(rows), "labels_given_per_image": given / len(rows)}

    def confusion(self, rows: LabelRows) -> None:
        return None

    def reliability_bins(self, rows: LabelRows) -> tuple[ReliabilityBin, ...]:
        return reliability_bins(rows.probs.ravel(), rows.targets.ravel())

    def fit_temperature(self, logits: Logits, targets: Targets) -> Temperature:
        return fit_sigmoid_temperature(logits, targets)

    def choose_thresholds(self, logits: Logits, targets: Targets) -> NDArray[np.float32]:
        checked = check_labels(logits, targets)
        return np.array([best_threshold(logits[:, label], checked[:, label]) for label in range(logits.shape[1])], np.float32)

    def default_thresholds(self, n_classes: int) -> tuple[float, ...]:
        return (0.5,) * n_classes

    def probability_thresholds(self, thresholds: NDArray[np.floating[Any]], temperature: float) -> tuple[float, ...]:
        return tuple(float(one) for one in self.probabilities(thresholds[None], temperature)[0])

    def logit_thresholds(self, thresholds: Sequence[float], temperature: float) -> NDArray[np.float64]:
        values = np.clip(np.asarray(thresholds, np.float64), _LEAST, 1.0 - _LEAST)
        return np.asarray(temperature * (np.log(values) - np.log1p(-values)))

    def predict_labels(self, probs: NDArray[np.floating[Any]], thresholds: Sequence[float] | None) -> NDArray[np.int64]:
        limits = np.full(len(probs), 0.5) if thresholds is None else np.asarray(thresholds)
        return np.asarray([label for label in self.ranking(probs) if probs[label] >= limits[label]], np.int64)

    def balance(self, targets: Targets, n_classes: int, class_weights: ClassWeights, logit_adjustment: float) -> Balance:
        return balance_of_labels(targets, class_weights, logit_adjustment)

    def label_text(self, target: Any, classes: Sequence[str]) -> str:
        return ", ".join(classes[label] for label in self.labels_of(target)) or NO_LABEL

    def labels_of(self, target: Any) -> tuple[int, ...]:
        return tuple(int(label) for label in np.flatnonzero(target))

    def cell_text(self, labels: Sequence[int], classes: Sequence[str]) -> str:
        return json.dumps([classes[label] for label in labels], ensure_ascii=False)

    def ranking(self, probs: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        return np.argsort(-probs, kind="stable")
