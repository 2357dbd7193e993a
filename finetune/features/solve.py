"""Solve a linear head on frozen features, with the L2 penalty chosen on held-out images.

If the backbone is frozen, the loss is a convex function of the head, so its minimum can be computed directly: by L-BFGS on
standardised features, warm-started along a path of L2 penalties. The standardisation is folded into the returned weights, so they
are an ordinary linear layer on raw features, and the class activation map of the exported head stays exact. The loss is that of
the task: see `finetune.features.softmax_head` and `finetune.features.sigmoid_head`.

Training, validation and cross-validation folds share one matrix and differ only in the weights of its rows; the weight of a
held-out row is zero. Uses NumPy only, so that a head on cached features is solved without torch in the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.features.lbfgs import Floats, Objective, minimise
from finetune.features.standardise import Float32s, standardise
from finetune.runtime.blas import blas_threads_for

# Penalties from strong to weak, two per decade. They are added to the mean loss: scikit-learn's C is 1 / (l2 * N).
L2_PATH = tuple(float(10.0**exponent) for exponent in np.arange(1.0, -5.1, -0.5))
L2_WITHOUT_EVIDENCE = 0.1  # if there are too few images to hold any out
PATIENCE = 2  # the path ends when this many penalties in a row are worse than the best; the weak end is slow and is never best
PATH_TOLERANCE = 1e-3  # relative to the optimum; the validation loss then is exact to three digits
FINAL_TOLERANCE = 1e-6


@dataclass(frozen=True)
class PathPoint:
    """One L2 penalty that was tried, with the loss and the metric on held-out rows."""

    l2: float
    val_nll: float
    val_score: float  # the headline metric of the task


@dataclass(frozen=True)
class SolvedHead:
    """A solved head, and how its L2 penalty was chosen."""

    weight: Float32s  # (C, D), for raw features
    bias: Float32s  # (C,)
    l2: float
    chosen_by: Literal["given", "validation", "cross-validation", "default"]
    path: tuple[PathPoint, ...]
    held_out_logits: Float32s | None  # (H, C), each row from a fit without it
    held_out_images: NDArray[np.int64]  # (H,) positions in val or, with cross-validation, in the training images
    iterations: int  # passes over the features, for the path and the final fit together
    gradient_norm: float  # at the solution, for standardised features
    converged: bool
    seconds: float

    def logits(self, features: NDArray[np.floating[Any]]) -> Float32s:
        """Return the logits (N, C) of features (N, D)."""
        return head_logits(features, self.weight, self.bias)


def head_logits(features: NDArray[np.floating[Any]], weight: Float32s, bias: Float32s) -> Float32s:
    """Return the logits (N, C) of a linear head (C, D), (C,) on features (N, D)."""
    with blas_threads_for(features.size):
        return np.asarray(features @ weight.T + bias, dtype=np.float32)


class Problem(Protocol):
    """A convex loss over a matrix of features. Parameters are (C, D + 1) float64; the last column is the unpenalised bias."""

    passes: int  # number of passes over the features so far

    def row_weights(self, weights: Floats) -> Floats:
        """Return the weights (R,) of the rows, multiplied by the weights of their classes."""
        ...

    def start(self, weights: Floats) -> Floats:
        """Return the optimum for an infinite penalty, where only the biases differ from zero."""
        ...

    def objective(self, weights: Floats, l2: float) -> Objective:
        """Return the function of the parameters that is minimised: weighted mean loss + (l2 / 2) |W|²."""
        ...

    def logits(self, parameters: Floats) -> Float32s:
        """Return the logits (R, C) of all rows."""
        ...

    def complete(self, parameters: Floats, weights: Floats) -> Floats:
        """Return the parameters with finite biases for classes that the rows with positive weight do not determine."""
        ...

    def loss_and_metric(self, logits: Float32s, rows: NDArray[np.int64]) -> tuple[float, float]:
        """Return the loss, by which the penalty is chosen, and the headline metric of logits for these rows."""
        ...


def solve_head(
    problem_of: Callable[[Float32s, NDArray[Any]], Problem],
    features: NDArray[np.floating[Any]],
    targets: NDArray[Any],
    *,
    val_features: NDArray[np.floating[Any]] | None,
    val_targets: NDArray[Any] | None,
    l2: float | None,
    strata: NDArray[np.integer[Any]],
    folds: int,
    seed: int,
    overwrite: NDArray[np.float32] | None,
    image_weights: NDArray[np.float64] | None = None,
) -> SolvedHead:
    """Try the path of L2 penalties and fit the head with the best one; see `solve_softmax_head`.

    Args:
        problem_of: constructs the problem from standardised rows (R, D) and the encoded target of each row.
        strata: (N,) integers that the folds are stratified by.
    """
    started = time.perf_counter()
    views = features.shape[1] if features.ndim == 3 else 1
    n_train, n_val = len(targets) * views, 0 if val_features is None else len(val_features)
    with blas_threads_for(features.size):
        of_rows = None if image_weights is None else np.repeat(image_weights, views)
        matrix = standardise(features.reshape(n_train, -1), val_features, overwrite, of_rows)
        row_targets = np.repeat(targets, views, axis=0)
        if val_targets is not None:
            row_targets = np.concatenate([row_targets, val_targets])
        problem = problem_of(matrix.rows, row_targets)
        # The weight of an image is its own weight times that of its class, and does not depend on the number of its views.
        of_views = np.where(np.arange(n_train + n_val) < n_train, 1.0 / views, 1.0)
        if of_rows is not None:
            of_views[:n_train] *= of_rows
        weights = problem.row_weights(of_views) * (np.arange(n_train + n_val) < n_train)

        splits: list[_Split] = []
        if l2 is None and n_val:
            splits = [_Split(weights, np.arange(n_train, n_train + n_val))]
        elif l2 is None:
            splits = _fold_splits(strata, weights, views, folds, seed)
        path, held_out_logits, start = _walk_path(problem, splits)
        best = min(path, key=lambda point: point.val_nll, default=None)
        chosen = l2 if l2 is not None else best.l2 if best else L2_WITHOUT_EVIDENCE

        start = problem.start(weights) if start is None else start
        solution = minimise(problem.objective(weights, chosen), start, FINAL_TOLERANCE)
        weight, bias = matrix.fold(problem.complete(solution.parameters, weights))
    return SolvedHead(
        weight=weight,
        bias=bias,
        l2=chosen,
        chosen_by="given" if l2 is not None else "default" if best is None else "validation" if n_val else "cross-validation",
        path=tuple(path),
        held_out_logits=held_out_logits,
        held_out_images=np.arange(n_val) if n_val else _held_out_images(splits, views),
        iterations=problem.passes,
        gradient_norm=solution.gradient_norm,
        converged=solution.converged,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Split:
    """The row weights for a fit, and the rows that the fit is evaluated on."""

    weights: Floats  # (R,) zero for held-out rows
    held_out: NDArray[np.int64]  # positions of rows


def _fold_splits(labels: NDArray[np.integer[Any]], row_weights: Floats, views: int, folds: int, seed: int) -> list[_Split]:
    """Return stratified folds of images. The only image of a class is never held out, because its class could not be learnt."""
    fold_of_image = np.full(len(labels), -1)
    generator = np.random.default_rng(seed)
    dealt = 0  # folds are dealt round robin across classes, so that small classes do not all land in the first folds
    for members in (np.flatnonzero(labels == label) for label in np.unique(labels)):
        if len(members) > 1:
            fold_of_image[generator.permutation(members)] = (dealt + np.arange(len(members))) % folds
            dealt += len(members)
    fold_of_row = np.repeat(fold_of_image, views)
    first_views = np.arange(len(labels)) * views
    return [
        _Split(row_weights * (fold_of_row != fold), first_views[fold_of_image == fold])
        for fold in range(folds)
        if (fold_of_image == fold).any()
    ]


def _held_out_images(splits: Sequence[_Split], views: int) -> NDArray[np.int64]:
    rows = [split.held_out for split in splits]
    return np.sort(np.concatenate(rows)) // views if rows else np.empty(0, dtype=np.int64)


def _walk_path(problem: Problem, splits: Sequence[_Split]) -> tuple[list[PathPoint], Float32s | None, Floats | None]:
    """Try the L2 penalties from strong to weak on every split.

    Returns:
        The points of the path, the best point's held-out logits (H, C) in the order of rows, and its parameters on the first
        split.
    """
    path: list[PathPoint] = []
    if not splits:
        return path, None, None
    trails: list[list[Floats]] = [[problem.start(split.weights)] for split in splits]
    rows = np.concatenate([split.held_out for split in splits])
    best_logits = best_start = None
    for l2 in L2_PATH:
        for split, trail in zip(splits, trails, strict=True):
            found = minimise(problem.objective(split.weights, l2), _extrapolate(trail), PATH_TOLERANCE)
            trail[:] = [*trail[-1:], found.parameters]
        logits = np.concatenate([problem.logits(trail[-1])[split.held_out] for split, trail in zip(splits, trails, strict=True)])
        path.append(PathPoint(l2, *problem.loss_and_metric(logits, rows)))
        best = min(range(len(path)), key=lambda index: path[index].val_nll)
        if best == len(path) - 1:
            best_logits, best_start = logits[np.argsort(rows, kind="stable")], trails[0][-1]
        if len(path) - 1 - best >= PATIENCE:
            break
    return path, best_logits, best_start


def _extrapolate(trail: Sequence[Floats]) -> Floats:
    """Extrapolate the solution for the next penalty linearly in log(l2), as a starting point; this halves the passes."""
    return trail[-1] if len(trail) < 2 else 2 * trail[-1] - trail[-2]


def linear_logits(rows: Float32s, parameters: Floats) -> Float32s:
    """Return the logits (R, C) of rows (R, D); the last column of the parameters (C, D + 1) is the bias."""
    narrow = parameters.astype(np.float32)
    return np.asarray(rows @ narrow[:, :-1].T + narrow[:, -1])
