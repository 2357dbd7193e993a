"""Temperature scaling (Guo et al. 2017, arXiv:1706.04599): one divisor of the logits that calibrates the probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.metrics import labels
from finetune.metrics.calibration import ece
from finetune.metrics.likelihood import nll
from finetune.metrics.rows import Integers, check, image_results, log_softmax

_BLOCK_ROWS = 4096
_BETA_LIMIT = 100.0  # inverse temperatures are searched between 1/100 and 100


@dataclass(frozen=True)
class Temperature:
    """The fitted divisor of the logits. Both ECEs are measured on the images it was fitted on, so `ece_after` is optimistic."""

    temperature: float
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float
    n: int
    at_limit: bool  # the optimum lies outside 1/100 .. 100, for example if all predictions are correct: do not apply it


def fit_softmax_temperature(logits: NDArray[np.floating[Any]], targets: NDArray[np.integer[Any]]) -> Temperature:
    """Find the T > 0 that minimises the negative log-likelihood of ``softmax(logits / T)``.

    The negative log-likelihood is convex in 1/T, so Newton's method inside a shrinking bracket finds its minimum. Fit on
    held-out images other than the test split.

    Raises:
        InvalidInput, TrainingError: as `image_results` does.
    """
    checked = check(logits, targets)
    beta = _best_beta(lambda beta: _derivatives(logits, checked, beta))
    before, after = image_results(logits, checked), image_results(logits, checked, beta)
    return Temperature(
        temperature=1.0 / beta,
        nll_before=nll(before),
        nll_after=nll(after),
        ece_before=ece(before),
        ece_after=ece(after),
        n=len(checked),
        at_limit=beta in (1.0 / _BETA_LIMIT, _BETA_LIMIT),
    )


def fit_sigmoid_temperature(logits: NDArray[np.floating[Any]], targets: NDArray[Any]) -> Temperature:
    """Find the T > 0, one for all labels, that minimises the binary cross entropy of ``sigmoid(logits / T)``.

    Raises:
        InvalidInput, TrainingError: as `label_results` does.
    """
    rows = labels.label_results(logits, targets)
    beta = _best_beta(lambda beta: _sigmoid_derivatives(rows, beta))
    after = labels.label_results(rows.logits * beta, targets)
    return Temperature(
        temperature=1.0 / beta,
        nll_before=labels.nll(rows),
        nll_after=labels.nll(after),
        ece_before=labels.ece(rows),
        ece_after=labels.ece(after),
        n=len(rows),
        at_limit=beta in (1.0 / _BETA_LIMIT, _BETA_LIMIT),
    )


def _best_beta(derivatives: Callable[[float], tuple[float, float]]) -> float:
    """Return the inverse temperature with the lowest loss within the limits; 1 if the loss does not depend on it.

    Args:
        derivatives: first and second derivative of the loss at an inverse temperature.
    """
    lower, upper, beta = 1.0 / _BETA_LIMIT, _BETA_LIMIT, 1.0
    if derivatives(upper)[0] < 0:
        return upper
    if derivatives(lower)[0] > 0:
        return lower
    for _ in range(100):
        slope, curvature = derivatives(beta)
        if slope == 0:
            break
        lower, upper = (lower, beta) if slope > 0 else (beta, upper)
        newton = beta - slope / curvature if curvature > 0 else math.inf
        candidate = newton if lower < newton < upper else math.sqrt(lower * upper)
        if abs(candidate - beta) <= 1e-12 * beta:
            break
        beta = candidate
    return beta


def _derivatives(logits: NDArray[np.floating[Any]], targets: Integers, beta: float) -> tuple[float, float]:
    """Return the derivatives in beta of the summed loss of ``beta * logits``: E[z] - z_true and Var[z] under the softmax."""
    slopes, curvatures = [], []
    for start in range(0, len(targets), _BLOCK_ROWS):
        block = logits[start : start + _BLOCK_ROWS].astype(np.float64)
        block -= block.max(axis=1, keepdims=True)
        probs = np.exp(log_softmax(block * beta))
        mean = (probs * block).sum(axis=1)
        true_logit = block[np.arange(len(block)), targets[start : start + _BLOCK_ROWS]]
        slopes.append(float((mean - true_logit).sum()))
        curvatures.append(float((probs * np.square(block - mean[:, None])).sum()))
    return math.fsum(slopes), math.fsum(curvatures)


def _sigmoid_derivatives(rows: labels.LabelRows, beta: float) -> tuple[float, float]:
    """Return the first and the second derivative in beta of the summed loss of ``beta * logits``."""
    probs = labels.sigmoid(rows.logits * beta)
    slope = float(((probs - rows.targets) * rows.logits).sum())
    return slope, float((probs * (1.0 - probs) * np.square(rows.logits)).sum())
