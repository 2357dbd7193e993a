"""Selective classification: the least confidence at which answers reach a requested precision.

Thresholds are tested from the most confident answer downwards until the first one fails. A threshold passes if, for a model whose
precision is just below the requested one, so few wrong answers would have a probability below `RISK`. This is fixed-sequence
testing as in "Learn then Test" (Angelopoulos et al. 2021, arXiv:2110.01052) with the exact binomial tail (Clopper & Pearson
1934), which selective classification has used since Geifman & El-Yaniv (2017, arXiv:1705.08500). A threshold at which the
held-out answers have exactly the requested precision would be too low for new images about half of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.rows import Floats

RISK = 0.1
"""The probability with which a threshold may be too low: the precision holds with 90 % confidence."""


@dataclass(frozen=True)
class OperatingPoint:
    """A confidence threshold, and its counts on the held-out images that it was chosen on."""

    threshold: float  # answers with at least this confidence are given
    n_answered: int
    n_right: int  # of those


def operating_point(confidence: Floats, right: NDArray[np.bool_], precision: float, risk: float = RISK) -> OperatingPoint | None:
    """Return the lowest threshold that passes, or None if these images cannot demonstrate the precision at any threshold.

    Args:
        confidence: (N,) probabilities of the held-out images' top classes.
        right: (N,) whether those classes were correct.
        precision: the requested one, above 0 and below 1.
    """
    from scipy.special import bdtr  # importing it takes a fifth of a second, which a run spends beside its training

    order = np.argsort(-confidence, kind="stable")
    wrong = np.cumsum(~right[order])
    answered = np.arange(1, len(order) + 1)
    # Answers of equal confidence are given or withheld together.
    whole = np.append(confidence[order][1:] < confidence[order][:-1], True)
    testable = whole & (precision**answered <= risk)  # with fewer answers, even if all were correct they would not be evidence
    candidates = np.flatnonzero(testable)
    failed = bdtr(wrong[candidates], answered[candidates], 1.0 - precision) > risk
    passed = candidates[: int(failed.argmax())] if failed.any() else candidates
    if not len(passed):
        return None
    last = int(passed[-1])
    return OperatingPoint(float(confidence[order][last]), last + 1, last + 1 - int(wrong[last]))
