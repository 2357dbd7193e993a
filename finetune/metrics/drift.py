"""Two-sample tests for drift: whether two samples of predictions come from the same distribution, and how far they differ.

Each test returns a p-value and an effect size, since with many images even irrelevant differences are significant: an alarm needs
both. The method is that of Rabanser, Günnemann & Lipton 2019, "Failing Loudly" (arXiv:1810.11953): univariate two-sample tests on
the outputs of a trained classifier, corrected for their number. Needs NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_EXPECTED = 5.0  # with a smaller expected count in a cell the chi-square approximation is not used
MAX_DRAWS = 9_999
_EXCEEDED = 50  # draws at least as extreme after which a Monte Carlo p-value is precise enough
_DRAWS_AT_ONCE = 250
_SEED = 0  # makes p-values deterministic
_SAME = 1e-9  # relative tolerance for equally extreme tables

Values = NDArray[np.floating[Any]]
Counts = NDArray[np.integer[Any]]


def ks_test(reference: Values, live: Values) -> tuple[float, float]:
    """Compare two samples with the two-sample Kolmogorov-Smirnov test; return the distance and the two-sided p-value.

    The p-value is asymptotic, with Stephens' correction for small samples (1970, JRSS B 32). Ties make it conservative.

    Args:
        reference, live: (N,) and (M,), neither empty.
    """
    reference, live = np.sort(reference), np.sort(live)
    everywhere = np.concatenate([reference, live])
    below = [np.searchsorted(sample, everywhere, side="right") / len(sample) for sample in (reference, live)]
    distance = float(np.abs(below[0] - below[1]).max())
    root = math.sqrt(len(reference) * len(live) / (len(reference) + len(live)))
    return distance, _kolmogorov_survival((root + 0.12 + 0.11 / root) * distance)


def _kolmogorov_survival(value: float) -> float:
    if value < 0.2:
        return 1.0  # to 12 digits
    terms = (math.copysign(1.0, k % 2 - 0.5) * math.exp(-2.0 * (k * value) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, 2.0 * sum(terms)))


def homogeneity_test(reference: Counts, live: Counts) -> tuple[float, float]:
    """Compare counts by class with Pearson's chi-square test of homogeneity; return the statistic and the p-value.

    If an expected count is below `LEAST_EXPECTED`, the p-value is computed from random tables with the same margins instead,
    drawn until it is precise enough (sequential Monte Carlo: Besag & Clifford 1991, Biometrika 78), valid for any counts.

    Args:
        reference, live: (C,) counts; neither all zero.
    """
    occurs = (reference + live) > 0
    first, second = reference[occurs].astype(np.int64), live[occurs].astype(np.int64)
    statistic = float(_chi_square(second[None], first + second)[0])
    if len(first) < 2:
        return 0.0, 1.0
    expected = np.outer([first.sum(), second.sum()], first + second) / (first.sum() + second.sum())
    if expected.min() >= LEAST_EXPECTED:
        return statistic, chi_square_survival(statistic, len(first) - 1)
    return statistic, _monte_carlo(statistic, first + second, int(second.sum()))


def _chi_square(live: NDArray[np.int64], total: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (K,) statistics for the rows of `live` counts (K, C); `total` (C,) are the counts of both samples together."""
    share = live.sum(axis=1, keepdims=True) / total.sum()
    return np.asarray(((live - total * share) ** 2 / (total * share * (1.0 - share))).sum(axis=1))


def _monte_carlo(statistic: float, total: NDArray[np.int64], n_live: int) -> float:
    draw = np.random.default_rng(_SEED)
    exceeded = drawn = 0
    while drawn < MAX_DRAWS:
        size = min(_DRAWS_AT_ONCE, MAX_DRAWS - drawn)
        tables = draw.multivariate_hypergeometric(total, n_live, size=size, method="marginals")
        exceeded += int((_chi_square(tables, total) >= statistic * (1.0 - _SAME)).sum())
        drawn += size
        if exceeded >= _EXCEEDED:
            break
    return (exceeded + 1) / (drawn + 1)


def chi_square_survival(value: float, degrees: int) -> float:
    """Return the probability that a chi-square variable with `degrees` degrees of freedom exceeds `value`."""
    if value <= 0.0:
        return 1.0
    half = value / 2.0
    odd = degrees % 2 == 1
    total = math.erfc(math.sqrt(half)) if odd else math.exp(-half)
    orders = np.arange(0.5 if odd else 1.0, degrees / 2.0)
    total += sum(math.exp(order * math.log(half) - half - math.lgamma(order + 1.0)) for order in orders)
    return min(1.0, total)


def population_stability_index(reference: Counts, live: Counts) -> float:
    """Return the population stability index of two samples' class shares, minus its expectation without drift; at least 0.

    The expectation is (C - 1)(1/N + 1/M) (Yurdakul & Naranjo 2020, Journal of Risk Model Validation 14), which for many classes
    and few images exceeds all usual thresholds.

    Args:
        reference, live: (C,) counts; neither all zero.
    """
    occurs = (reference + live) > 0
    n_classes = int(occurs.sum())
    sizes = [int(counts.sum()) for counts in (reference, live)]
    first, second = (
        (counts[occurs] + 0.5) / (size + 0.5 * n_classes) for counts, size in zip((reference, live), sizes, strict=True)
    )
    index = float(((second - first) * np.log(second / first)).sum())
    return max(0.0, index - (n_classes - 1) * (1.0 / sizes[0] + 1.0 / sizes[1]))


def labels_test(reference: Counts, n_reference: int, live: Counts, n_live: int) -> tuple[float, float]:
    """Compare the frequencies of a multi-label model's labels; return the largest difference and the p-value over all labels.

    Fisher's exact test is used for each label. The smallest p-value is multiplied by the number of labels (Bonferroni), which is
    valid for any dependence between labels.

    Args:
        reference, live: (C,) numbers of images with each label, out of `n_reference` and `n_live`.
    """
    difference = float(np.abs(reference / n_reference - live / n_live).max())
    smallest = min(_fisher(int(a), n_reference, int(b), n_live) for a, b in zip(reference, live, strict=True))
    return difference, min(1.0, smallest * len(reference))


def _fisher(first: int, n_first: int, second: int, n_second: int) -> float:
    """Return the two-sided p-value of Fisher's exact test on `first` of `n_first` against `second` of `n_second`."""
    total, everything = first + second, n_first + n_second
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, everything + 1)))])  # of the factorials
    possible = np.arange(max(0, total - n_first), min(n_second, total) + 1)
    chosen = logs[n_second] - logs[possible] - logs[n_second - possible]
    others = logs[n_first] - logs[total - possible] - logs[n_first - total + possible]
    probabilities = np.exp(chosen + others - (logs[everything] - logs[total] - logs[everything - total]))
    observed = probabilities[second - possible[0]]
    return min(1.0, float(probabilities[probabilities <= observed * (1.0 + 1e-7)].sum()))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return p-values adjusted for multiple testing by Holm's (1979) method, which is valid for any dependence."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = largest
    return tuple(float(value) for value in adjusted)
