"""Exactly one label per image: softmax, and the most probable class is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import InvalidInput
from finetune.metrics import Metric
from finetune.metrics.accuracy import MACRO_F1, MEAN_PER_CLASS_ACCURACY, TOP1, TOP5
from finetune.metrics.calibration import ECE, ReliabilityBin, reliability_bins
from finetune.metrics.likelihood import BRIER, NLL
from finetune.metrics.rows import Rows, judge_rows, log_softmax
from finetune.metrics.temperature import Temperature, fit_softmax_temperature
from finetune.tasks.task import Logits, Target, Targets


class Multiclass:
    """Classes that exclude each other."""

    name = "multiclass"
    metrics: Sequence[Metric[Rows]] = (TOP1, TOP5, MACRO_F1, MEAN_PER_CLASS_ACCURACY, NLL, ECE, BRIER)
    headline: Metric[Rows] = TOP1

    def encode(self, targets: Sequence[Target], n_classes: int) -> NDArray[np.int64]:
        """Return (N,) class indices."""
        several = next((target for target in targets if not isinstance(target, int)), None)
        if several is not None:
            raise InvalidInput(f"task multiclass takes exactly one label per image, given {several}; set task: multilabel")
        return np.array(targets, dtype=np.int64)

    def probabilities(self, logits: Logits, temperature: float = 1.0) -> NDArray[np.float64]:
        return np.exp(log_softmax(logits.astype(np.float64) / temperature))

    def judge(self, logits: Logits, targets: Targets) -> Rows:
        return judge_rows(logits, targets)

    def chance(self, targets: Targets) -> float:
        return float(np.bincount(targets).max() / len(targets))

    def class_counts(self, rows: Rows) -> Sequence[tuple[int, int, int]]:
        true, given, correct = rows.confusion.sum(axis=1), rows.confusion.sum(axis=0), np.diagonal(rows.confusion)
        return [(int(t), int(g), int(c)) for t, g, c in zip(true, given, correct, strict=True)]

    def confusion(self, rows: Rows) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(int(count) for count in row) for row in rows.confusion)

    def reliability_bins(self, rows: Rows) -> tuple[ReliabilityBin, ...]:
        return reliability_bins(rows.confidence, rows.predicted == rows.targets)

    def fit_temperature(self, logits: Logits, targets: Targets) -> Temperature:
        return fit_softmax_temperature(logits, targets)

    def label_text(self, target: Any, classes: Sequence[str]) -> str:
        return classes[int(target)]

    def ranking(self, probs: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        return np.argsort(-probs, kind="stable")
