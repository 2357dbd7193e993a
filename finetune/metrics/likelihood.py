"""Proper scores of probabilities: negative log-likelihood and Brier score."""

from __future__ import annotations

import math

from finetune.metrics import UNBOUNDED, Metric
from finetune.metrics.rows import Rows


def nll(rows: Rows) -> float:
    """Return the mean negative log-likelihood of the true class, in nats."""
    return math.fsum(rows.nll) / len(rows)


def brier(rows: Rows) -> float:
    """Return the mean squared distance of the probabilities from the one-hot truth, 0 to 2 (Brier 1950)."""
    return math.fsum(rows.brier) / len(rows)


NLL = Metric("loss", "negative log-likelihood", nll, higher_is_better=False, largest=UNBOUNDED)
BRIER = Metric("brier", "Brier score", brier, higher_is_better=False, largest=2.0)
