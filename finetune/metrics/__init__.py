"""Metrics, one family a module: a function of judged rows with its name, its bounds and how people read it.

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

    `weighted` is the same figure where each image counts several times or not at all, for many such weightings at once: the
    bootstrap resamples images so.
    """

    key: str  # as in ``test/top1``
    label: str  # as people read it
    compute: Callable[[RowsT], float]
    weighted: Callable[[RowsT, NDArray[np.float64]], NDArray[np.float64]]  # with (B, N) weights of the images, to (B,)
    interval: Callable[[RowsT], Interval] | None = None  # 95 %
    higher_is_better: bool = True
    largest: float = 1.0  # values lie between 0 and this
    percent: bool = False  # shown as a percentage
    over_classes: bool = False  # a mean over classes instead of images
    least_classes: int = 2  # with fewer classes the value says nothing, and people are not shown it

    def text(self, value: float) -> str:
        """Return a value as people read it."""
        return f"{value:.1%}" if self.percent else f"{value:.3f}"

    def bounded(self, low: float, high: float) -> Interval:
        """Return an interval cut to the values that the metric can have."""
        return max(0.0, low), min(self.largest, high)


UNBOUNDED = math.inf


def weighted_mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of values (N,) under each of (B, N) weightings: (B,)."""
    return np.asarray(weights @ values / weights.sum(axis=1))
