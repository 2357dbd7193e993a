"""95 % confidence intervals of metrics that were measured on a sample of images."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054  # the 0.975 quantile of the standard normal distribution


def wilson_interval(n_correct: float, n: int) -> tuple[float, float]:
    """Return the interval of a proportion (Wilson 1927): within 0..1, and of positive width even if `n_correct` is 0 or `n`."""
    share = n_correct / n
    centre = share + Z95**2 / (2 * n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    return max(0.0, min(share, (centre - half) / scale)), min(1.0, max(share, (centre + half) / scale))


def interval_of_mean_of_proportions(n_correct: Sequence[float], n: Sequence[int]) -> tuple[float, float]:
    """Return the interval of the unweighted mean of independent proportions, such as the mean recall over classes.

    Each bound is the wider of two. The first combines Wilson's limits of the proportions (Zou, Huang & Zhang 2009, "A note on
    confidence interval estimation for a linear function of binomial proportions", Computational Statistics & Data Analysis 53).
    It is accurate for few proportions, including proportions of 0 or 1, for which Wald's and the bootstrap's variance is zero.
    The second is normal, with half a success and half a failure added to each proportion for its variance. It is accurate for
    many proportions with small n, for which the first is too narrow. ``benchmarks/macro_interval.py`` measures the coverage.
    """
    shares = [k / m for k, m in zip(n_correct, n, strict=True)]
    mean = math.fsum(shares) / len(shares)
    limits = [wilson_interval(k, m) for k, m in zip(n_correct, n, strict=True)]
    smoothed = [((k + 0.5) / (m + 1), m) for k, m in zip(n_correct, n, strict=True)]
    normal = Z95**2 * math.fsum(share * (1 - share) / m for share, m in smoothed)
    below = math.fsum((share - low) ** 2 for share, (low, _) in zip(shares, limits, strict=True))
    above = math.fsum((high - share) ** 2 for share, (_, high) in zip(shares, limits, strict=True))
    down, up = (math.sqrt(max(of_limits, normal)) / len(shares) for of_limits in (below, above))
    return max(0.0, mean - down), min(1.0, mean + up)
