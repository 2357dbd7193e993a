"""The statistics that the checks use. Needs NumPy only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation.predictions import Predictions

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error."""

    value: float
    error: float
    n: int

    @property
    def z(self) -> float:
        """The mean divided by its standard error."""
        if self.error > 0:
            return self.value / self.error
        return math.inf if self.value > 0 else -math.inf if self.value < 0 else 0.0


def mean_of(values: Floats) -> Mean:
    """Return the mean of a sample."""
    n = len(values)
    spread = float(values.std(ddof=1)) if n > 1 else math.inf
    return Mean(float(values.mean()), spread / math.sqrt(n), n)


def ratio(value: float, threshold: float) -> float:
    """Return how many times its threshold a value is; if that is 0, as of a sample without spread, 0 or infinite."""
    return value / threshold if threshold > 0 else math.inf if value > 0 else 0.0


def share(count: int, n: int) -> Mean:
    """Return the share `count / n` with Agresti and Coull's (1998) standard error, which is never zero."""
    p, m = (count + 2) / (n + 4), n + 4
    return Mean(count / n, math.sqrt(p * (1 - p) / m), n)


def paired(first: Predictions, second: Predictions, of_first: Floats, of_second: Floats) -> Mean | None:
    """Return the mean of the second value minus the first over the images in both tables; None for fewer than two images."""
    row_of = {image: row for row, image in enumerate(first.ids)}
    pairs = [(row_of[image], row) for row, image in enumerate(second.ids) if image in row_of]
    if len(pairs) < 2:
        return None
    rows = np.array(pairs)
    return mean_of(of_second[rows[:, 1]] - of_first[rows[:, 0]])


def slope(values: Floats) -> Mean:
    """Return the least-squares slope of equally spaced values, with its standard error."""
    n = len(values)
    if n < 3:
        return Mean(0.0, math.inf, n)
    x = np.arange(n) - (n - 1) / 2
    b = float((x * values).sum() / (x * x).sum())
    rest = values - values.mean() - b * x
    variance = float((rest * rest).sum() / (n - 2))
    return Mean(b, math.sqrt(variance / float((x * x).sum())), n)


def log_binomial_tail(n: int, k: int, p: float) -> float:
    """Return the natural logarithm of the probability of at least `k` successes in `n` trials of probability `p`."""
    if k <= 0:
        return 0.0
    terms = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k, n + 1)
    ]
    largest = max(terms)
    return largest + math.log(math.fsum(math.exp(term - largest) for term in terms))
