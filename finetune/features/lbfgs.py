"""Minimise a smooth convex function with L-BFGS and backtracking. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SMALLEST_GRADIENT = 1e-6  # smaller gradients are rounding errors of float32 sums
MAX_ITERATIONS = 1000
Floats = NDArray[np.float64]
Objective = Callable[[Floats], tuple[float, Floats, float]]  # parameters -> value, gradient, bound on the distance to the optimum


@dataclass(frozen=True)
class Minimum:
    """The result of a minimisation."""

    parameters: Floats
    value: float
    gradient_norm: float
    iterations: int
    converged: bool


def minimise(objective: Objective, start: Floats, tolerance: float, *, memory: int = 10) -> Minimum:
    """Minimise with L-BFGS and backtracking, until the value is within `tolerance` (relative) of the optimum.

    Args:
        memory: number of earlier steps that the quasi-Newton direction is computed from.
    """
    point = start
    value, gradient, gap = objective(point)
    steps: list[tuple[Floats, Floats]] = []  # (change of point, change of gradient), newest last
    iterations = 0
    while not (solved := gap <= tolerance * abs(value) or float(np.abs(gradient).max()) <= SMALLEST_GRADIENT):
        direction = _two_loop(gradient, steps)
        found = _backtrack(objective, point, value, gradient, direction)
        if found is None or iterations == MAX_ITERATIONS:
            break
        iterations += 1
        new_point, value, new_gradient, gap = found
        change, bend = new_point - point, new_gradient - gradient
        if float((change * bend).sum()) > 1e-12 * float((bend * bend).sum()):
            steps = [*steps, (change, bend)][-memory:]
        point, gradient = new_point, new_gradient
    return Minimum(point, value, float(np.linalg.norm(gradient)), iterations, solved)


def _two_loop(gradient: Floats, steps: Sequence[tuple[Floats, Floats]]) -> Floats:
    """Return the quasi-Newton direction, to be subtracted (Nocedal & Wright, Numerical Optimization, algorithm 7.4)."""
    if not steps:
        return gradient / max(1.0, float(np.linalg.norm(gradient)))
    direction = gradient.copy()
    alphas = []
    for change, bend in reversed(steps):
        alpha = float((change * direction).sum() / (change * bend).sum())
        direction -= alpha * bend
        alphas.append(alpha)
    newest_change, newest_bend = steps[-1]
    direction *= float((newest_change * newest_bend).sum() / (newest_bend * newest_bend).sum())
    for (change, bend), alpha in zip(steps, reversed(alphas), strict=True):
        direction += change * (alpha - float((bend * direction).sum() / (change * bend).sum()))
    return direction


def _backtrack(
    objective: Objective, point: Floats, value: float, gradient: Floats, direction: Floats
) -> tuple[Floats, float, Floats, float] | None:
    """Return the first of the steps 1, 1/2, 1/4 … that decreases the value sufficiently (Armijo condition); None if none does.

    Returns:
        The new point, its value, its gradient and its bound on the distance to the optimum.
    """
    slope = float((gradient * direction).sum())
    for halvings in range(30):
        step = 0.5**halvings
        candidate = point - step * direction
        new_value, new_gradient, gap = objective(candidate)
        if new_value <= value - 1e-4 * step * slope:
            return candidate, new_value, new_gradient, gap
    return None
