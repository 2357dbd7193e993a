"""Answering only where the model is sure enough: the confidence from which on answers are as precise as was asked.

Thresholds are tried from the most confident answer down, and the search ends at the first that fails: a threshold passes if so
few wrong answers would be improbable, below `RISK`, were the precision just below what was asked. This is fixed-sequence testing
as in "Learn then Test" (Angelopoulos et al. 2021, arXiv:2110.01052) with the exact binomial tail (Clopper & Pearson 1934), which
selective classification has used since Geifman & El-Yaniv (2017, arXiv:1705.08500). The threshold at which the held-out answers
themselves are just as precise as was asked would be too low for new images about half of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr

from finetune.metrics.rows import Floats

RISK = 0.1
"""The probability with which a threshold may be too low: the precision holds with 90 % confidence."""


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold of confidence, and what it came to on the held-out images that it was chosen on."""

    threshold: float  # answers with at least this confidence are given
    n_answered: int
    n_right: int  # of those


def operating_point(confidence: Floats, right: NDArray[np.bool_], precision: float, risk: float = RISK) -> OperatingPoint | None:
    """Return the lowest threshold that passes; None where these images cannot show that precision at any.

    Args:
        confidence: (N,) of held-out answers.
        right: (N,) whether they were right.
        precision: above 0 and below 1.
    """
    order = np.argsort(-confidence, kind="stable")
    wrong = np.cumsum(~right[order])
    answered = np.arange(1, len(order) + 1)
    # Answers of equal confidence are given or withheld together.
    whole = np.append(confidence[order][1:] < confidence[order][:-1], True)
    testable = whole & (precision**answered <= risk)  # of fewer answers, not even all right would be evidence
    candidates = np.flatnonzero(testable)
    failed = bdtr(wrong[candidates], answered[candidates], 1.0 - precision) > risk
    passed = candidates[: int(failed.argmax())] if failed.any() else candidates
    if not len(passed):
        return None
    last = int(passed[-1])
    return OperatingPoint(float(confidence[order][last]), last + 1, last + 1 - int(wrong[last]))
