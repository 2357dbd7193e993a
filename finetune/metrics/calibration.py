"""Calibration: whether, for example, 80 % of the labels given with probability 0.8 are correct."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.metrics import Metric
from finetune.metrics.rows import Floats, Rows

ECE_BINS = 15
"""Equal-width bins of the top label's probability, each open below and closed above: ``(i/15, (i+1)/15]`` (Guo et al. 2017)."""


@dataclass(frozen=True)
class ReliabilityBin:
    """Images whose top probability lies in ``(lower, upper]``."""

    lower: float
    upper: float
    n: int
    confidence: float | None  # mean top probability; None if the bin is empty
    accuracy: float | None


def reliability_bins(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> tuple[ReliabilityBin, ...]:
    """Sort N predictions into `ECE_BINS` bins by their probability (N,); `correct` (N,) says which are right."""
    edges = np.linspace(0.0, 1.0, ECE_BINS + 1)
    bin_of = np.searchsorted(edges[1:-1], confidence, side="left")
    n = np.bincount(bin_of, minlength=ECE_BINS)
    confidence_sum = np.bincount(bin_of, weights=confidence, minlength=ECE_BINS)
    correct_sum = np.bincount(bin_of, weights=correct, minlength=ECE_BINS)
    return tuple(
        ReliabilityBin(
            lower=float(edges[i]),
            upper=float(edges[i + 1]),
            n=int(n[i]),
            confidence=float(confidence_sum[i] / n[i]) if n[i] else None,
            accuracy=float(correct_sum[i] / n[i]) if n[i] else None,
        )
        for i in range(ECE_BINS)
    )


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Return the mean over images of the gap between accuracy and confidence in their bin (Guo et al. 2017, arXiv:1706.04599)."""
    gaps = (b.n * abs(b.accuracy - b.confidence) for b in bins if b.accuracy is not None and b.confidence is not None)
    return math.fsum(gaps) / sum(b.n for b in bins)


def ece(rows: Rows) -> float:
    """Return the expected calibration error of the predicted classes."""
    return expected_calibration_error(reliability_bins(rows.confidence, rows.predicted == rows.targets))


def weighted_ece(rows: Rows, weights: Floats) -> Floats:
    edges = np.linspace(0.0, 1.0, ECE_BINS + 1)
    inside = np.zeros((len(rows), ECE_BINS))
    inside[np.arange(len(rows)), np.searchsorted(edges[1:-1], rows.confidence, side="left")] = 1.0
    gaps = (rows.score - rows.confidence)[:, None] * inside  # a bin's gap is the sum of these over its images
    return np.asarray(np.abs(weights @ gaps).sum(axis=1) / weights.sum(axis=1))


ECE = Metric("ece", "expected calibration error", ece, weighted_ece, higher_is_better=False)
