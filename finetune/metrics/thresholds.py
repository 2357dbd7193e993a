"""Choose the threshold of each label for the highest F1 on new images, from held-out images.

The threshold with the highest F1 on the held-out images themselves overfits to single images if a label is rare (Fan & Lin 2007).
Therefore the logits are calibrated first by Platt scaling (Platt 1999, with his targets, which prevent an exact fit of rare
labels). For calibrated probabilities the optimal threshold is half the highest expected F1 (Lipton, Elkan & Naryanaswamy 2014,
ECML PKDD, arXiv:1402.1892). Scaled or shifted logits, as class weights and losses other than cross entropy cause them, scale or
shift the threshold alike. ``docs/multilabel.md`` has the measured gain.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.labels import sigmoid
from finetune.metrics.rows import Floats

FEWEST_OF_EACH = 10  # images with the label, and as many without it; with fewer the threshold stays at probability 1/2
_STEPS = 50
_RIDGE = 1e-6  # keeps the equations solvable if the label is perfectly separable


def best_threshold(logits: NDArray[np.floating[Any]], targets: NDArray[np.bool_]) -> float:
    """Return the threshold on the logits (N,) with the highest expected F1; 0 if the images do not suffice to choose one."""
    n_positive = int(targets.sum())
    if min(n_positive, len(targets) - n_positive) < FEWEST_OF_EACH:
        return 0.0
    values = logits.astype(np.float64)
    scale, shift = fit_platt(values, targets)
    if scale <= 0:  # the label is less probable where its logit is higher
        return 0.0
    probs = np.sort(sigmoid(scale * values + shift))[::-1]
    expected_f1 = float((2 * np.cumsum(probs) / (np.arange(1, len(probs) + 1) + probs.sum())).max())
    limit = expected_f1 / 2
    found = (math.log(limit / (1.0 - limit)) - shift) / scale
    return found if math.isfinite(found) else 0.0


def fit_platt(values: Floats, targets: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the scale and shift of Platt's calibrated probability ``sigmoid(scale * logit + shift)``, by Newton's method."""
    n_positive = int(targets.sum())
    n_negative = len(targets) - n_positive
    wanted = np.where(targets, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))
    mean, spread = float(values.mean()), float(values.std()) or 1.0
    inputs = np.stack([(values - mean) / spread, np.ones_like(values)], axis=1)
    solution = np.array([1.0, math.log((n_positive + 1) / (n_negative + 1))])
    for _ in range(_STEPS):
        probs = sigmoid(inputs @ solution)
        curvature = (inputs * (probs * (1.0 - probs))[:, None]).T @ inputs + _RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, inputs.T @ (probs - wanted))
        longest = float(np.abs(step).max())
        solution = solution - step * min(1.0, 2.0 / max(longest, 1e-300))  # a full step may overshoot far from the solution
        if longest < 1e-9:
            break
    scale = float(solution[0]) / spread
    return scale, float(solution[1]) - scale * mean
