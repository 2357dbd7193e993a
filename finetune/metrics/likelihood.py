"""Proper scoring rules for probabilities: negative log-likelihood and Brier score."""

from __future__ import annotations

import math

from finetune.metrics import UNBOUNDED, Metric, weighted_mean
from finetune.metrics.rows import Floats, Rows


def nll(rows: Rows) -> float:
    """Return the mean negative log-likelihood of the true class, in nats."""
    return math.fsum(rows.nll) / len(rows)


def brier(rows: Rows) -> float:
    """Return the mean squared distance of the probabilities from the one-hot truth, 0 to 2 (Brier 1950)."""
    return math.fsum(rows.brier) / len(rows)


def weighted_nll(rows: Rows, weights: Floats) -> Floats:
    return weighted_mean(rows.nll, weights)


def weighted_brier(rows: Rows, weights: Floats) -> Floats:
    return weighted_mean(rows.brier, weights)


NLL = Metric("loss", "negative log-likelihood", nll, weighted_nll, higher_is_better=False, largest=UNBOUNDED)
BRIER = Metric("brier", "Brier score", brier, weighted_brier, higher_is_better=False, largest=2.0)
