"""Metrics, one module per family: functions of per-image results, each with its key, its display name and its range of values.

A task lists the metrics that it reports; a new metric is a function here and a line in that list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

RowsT = TypeVar("RowsT")
Interval = tuple[float, float]


@dataclass(frozen=True)
class Metric(Generic[RowsT]):
    """One figure over the images of a split, computed from rows of type `RowsT`.

    `weighted` computes the same figure for many weightings of the images at once. The bootstrap uses it: a resampling is a
    weighting by how often each image was drawn.
    """

    key: str  # as in ``test/top1``
    label: str  # for display
    compute: Callable[[RowsT], float]
    weighted: Callable[[RowsT, NDArray[np.float64]], NDArray[np.float64]]  # with (B, N) weights of the images, to (B,)
    interval: Callable[[RowsT], Interval] | None = None  # 95 %
    higher_is_better: bool = True
    largest: float = 1.0  # values lie between 0 and this
    percent: bool = False  # shown as a percentage
    over_classes: bool = False  # a mean over classes instead of images
    least_classes: int = 2  # with fewer classes the value is not informative and not displayed

    def text(self, value: float) -> str:
        """Return a value as text for display."""
        return f"{value:.1%}" if self.percent else f"{value:.3f}"

    def bounded(self, low: float, high: float) -> Interval:
        """Return an interval clipped to the metric's range."""
        return max(0.0, low), min(self.largest, high)


UNBOUNDED = math.inf


def weighted_mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (B,) weighted means of values (N,) under weights (B, N)."""
    return np.asarray(weights @ values / weights.sum(axis=1))
