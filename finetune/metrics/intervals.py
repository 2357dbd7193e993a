"""95 % confidence intervals of metrics that were measured on a sample of images."""

from __future__ import annotations

import math

Z95 = 1.959963984540054  # the 0.975 quantile of the standard normal distribution


def wilson_interval(n_correct: float, n: int) -> tuple[float, float]:
    """Return the interval of a proportion (Wilson 1927): within 0..1, and of positive width even if `n_correct` is 0 or `n`."""
    share = n_correct / n
    centre = share + Z95**2 / (2 * n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    return max(0.0, min(share, (centre - half) / scale)), min(1.0, max(share, (centre + half) / scale))
