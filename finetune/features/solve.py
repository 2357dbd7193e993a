"""Solve the linear head: logistic regression on frozen features, with the L2 penalty chosen on held-out images.

If the backbone is frozen, the loss is a convex function of the head, so its minimum can be computed directly: by L-BFGS on
standardised features, warm-started along a path of L2 penalties. The standardisation is folded into the returned weights, so they
are an ordinary linear layer on raw features, and the class activation map of the exported head stays exact.

Training, validation and cross-validation folds share one matrix and differ only in the weights of its rows; the weight of a
held-out row is zero. Uses NumPy only, so that a head on cached features is solved without torch in the process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.errors import TrainingError
from finetune.metrics.accuracy import top1
from finetune.metrics.likelihood import nll
from finetune.metrics.rows import image_results
from finetune.runtime.blas import blas_threads_for

# Penalties from strong to weak, two per decade. They are added to the mean loss: scikit-learn's C is 1 / (l2 * N).
L2_PATH = tuple(float(10.0**exponent) for exponent in np.arange(1.0, -5.1, -0.5))
L2_WITHOUT_EVIDENCE = 0.1  # if there are too few images to hold any out
PATIENCE = 2  # the path ends when this many penalties in a row are worse than the best; the weak end is slow and is never best
PATH_TOLERANCE = 1e-3  # relative to the optimum; the validation loss then is exact to three digits
FINAL_TOLERANCE = 1e-6
SMALLEST_GRADIENT = 1e-6  # smaller gradients are rounding errors of float32 sums
MAX_ITERATIONS = 1000
CHUNK_ROWS = 4096

Float32s = NDArray[np.float32]
Floats = NDArray[np.float64]


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


def solve_softmax_head(
    features: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    num_classes: int,
    *,
    val_features: NDArray[np.floating[Any]] | None = None,
    val_targets: NDArray[np.integer[Any]] | None = None,
    l2: float | None = None,
    label_smoothing: float = 0.0,
    class_weights: NDArray[np.floating[Any]] | None = None,
    image_weights: NDArray[np.float64] | None = None,
    folds: int = 5,
    seed: int = 0,
    overwrite: NDArray[np.float32] | None = None,
) -> SolvedHead:
    """Fit softmax(W x + b) to `labels`.

    Args:
        features: (N, D), or (N, K, D) for K views of each image, of which view 0 is not augmented. The views of an image share
            its weight and are held out together.
        labels: (N,) in [0, num_classes).
        val_features: (M, D). Without them, the L2 penalty is chosen by `folds`-fold cross-validation on `features`.
        l2: the penalty (l2 / 2) * |W|² on standardised features is added to the mean loss; None: it is chosen.
        class_weights: (C,) by which the weight of each row of a class is multiplied, in the fit and in the loss on held-out rows.
        image_weights: (N,) by which the weight of each image is multiplied in the fit, including the standardisation, so that an
            image of weight 2 equals two copies of it. The loss on held-out rows does not use them.
        overwrite: (N * K + M, D) the array that contains `features` and `val_features`, in this order, if it may be overwritten;
            this saves a copy of all features.

    Raises:
        TrainingError: some features are not finite.
    """

    def problem_of(rows: Float32s, row_labels: NDArray[Any]) -> _Problem:
        return _Problem(rows, row_labels.astype(np.int64), num_classes, label_smoothing, class_weights)

    return solve_head(
        problem_of,
        features,
        labels,
        val_features=val_features,
        val_targets=val_targets,
        l2=l2,
        strata=labels,
        folds=folds,
        seed=seed,
        overwrite=overwrite,
        image_weights=image_weights,
    )


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
        matrix = _standardise(features.reshape(n_train, -1), val_features, overwrite, of_rows)
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


@dataclass(frozen=True)
class _Standardised:
    """The feature matrix, standardised to zero mean and unit variance over its training rows.

    A feature that is constant (up to float32 rounding) becomes zero, and so does its weight.
    """

    rows: Float32s  # (N*K + M, D)
    mean: Floats  # (D,)
    inverse_std: Floats  # (D,), zero for a constant feature

    def fold(self, parameters: Floats) -> tuple[Float32s, Float32s]:
        """Convert parameters (C, D + 1) for standardised rows into weight (C, D) and bias (C,) for raw rows."""
        weight = parameters[:, :-1] * self.inverse_std
        bias = parameters[:, -1] - weight @ self.mean
        return weight.astype(np.float32), bias.astype(np.float32)


def _standardise(
    train: NDArray[np.floating[Any]],
    val: NDArray[np.floating[Any]] | None,
    overwrite: Float32s | None,
    weights: Floats | None = None,
) -> _Standardised:
    """Standardise the features of training and validation rows; write the result into `overwrite` if it is given.

    Raises:
        TrainingError: some rows are not finite.
    """
    mean, inverse_std = _moments(train) if weights is None else _weighted_moments(train, weights)
    parts = [train] if val is None else [train, val]
    shape = (sum(len(part) for part in parts), train.shape[1])
    rows = np.empty(shape, np.float32) if overwrite is None else overwrite
    if rows.shape != shape:
        raise ValueError(f"an array of shape {rows.shape} does not hold {shape[0]} rows of {shape[1]} features")
    filled = 0
    for part in parts:
        for chunk in _chunks(part):
            rows[filled : filled + len(chunk)] = (chunk - mean) * inverse_std
            filled += len(chunk)
    broken = np.flatnonzero(~np.isfinite(rows.sum(axis=1, dtype=np.float64)))
    if len(broken):
        raise TrainingError(
            f"{len(broken)} of {len(rows)} feature rows are not finite (first: {broken[:5].tolist()}). "
            "Check the weights file, or try compute.precision=float32"
        )
    return _Standardised(rows, mean, inverse_std)


def _moments(matrix: NDArray[np.floating[Any]]) -> tuple[Floats, Floats]:
    """Return mean and 1 / standard deviation (D,) of the columns, in two passes: a single pass would suffer from cancellation."""
    n_columns = matrix.shape[1]
    total, squares, largest = np.zeros(n_columns), np.zeros(n_columns), np.zeros(n_columns)
    for chunk in _chunks(matrix):
        total += chunk.sum(axis=0)
        np.maximum(largest, np.abs(chunk).max(axis=0), out=largest)
    mean = total / len(matrix)
    for chunk in _chunks(matrix):
        squares += np.square(chunk - mean).sum(axis=0)
    std = np.sqrt(squares / len(matrix))
    constant = std <= 1e-6 * largest
    return mean, np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, std))


def _weighted_moments(matrix: NDArray[np.floating[Any]], weights: Floats) -> tuple[Floats, Floats]:
    """Return weighted mean and 1 / weighted standard deviation (D,) of the columns, for row weights (N,); see `_moments`."""
    n_columns = matrix.shape[1]
    total, squares, largest = np.zeros(n_columns), np.zeros(n_columns), np.zeros(n_columns)
    starts = range(0, len(matrix), CHUNK_ROWS)
    for start, chunk in zip(starts, _chunks(matrix), strict=True):
        total += weights[start : start + CHUNK_ROWS] @ chunk
        np.maximum(largest, np.abs(chunk).max(axis=0), out=largest)
    mean = total / weights.sum()
    for start, chunk in zip(starts, _chunks(matrix), strict=True):
        squares += weights[start : start + CHUNK_ROWS] @ np.square(chunk - mean)
    std = np.sqrt(squares / weights.sum())
    constant = std <= 1e-6 * largest
    return mean, np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, std))


def _chunks(matrix: NDArray[np.floating[Any]]) -> Iterator[Floats]:
    """Yield the rows as float64, `CHUNK_ROWS` at a time, because a copy of the whole matrix may not fit into memory."""
    for first in range(0, len(matrix), CHUNK_ROWS):
        yield np.asarray(matrix[first : first + CHUNK_ROWS], dtype=np.float64)


Objective = Callable[[Floats], tuple[float, Floats, float]]  # parameters -> value, gradient, bound on the distance to the optimum


class _Problem:
    """The `Problem` of softmax cross-entropy with label smoothing."""

    def __init__(
        self,
        rows: Float32s,
        labels: NDArray[np.int64],
        num_classes: int,
        label_smoothing: float,
        class_weights: NDArray[np.floating[Any]] | None,
    ) -> None:
        self.rows = rows  # (R, D)
        self.labels = labels  # (R,)
        self.class_weights = class_weights  # (C,)
        self.passes = 0
        self._targets = np.full((num_classes, len(labels)), label_smoothing / num_classes, dtype=np.float32)
        self._targets[labels, np.arange(len(labels))] += np.float32(1.0 - label_smoothing)

    def row_weights(self, weights: Floats) -> Floats:
        if self.class_weights is None:
            return weights
        return weights * np.asarray(self.class_weights, dtype=np.float64)[self.labels]

    def loss_and_metric(self, logits: Float32s, rows: NDArray[np.int64]) -> tuple[float, float]:
        labels = self.labels[rows]
        results = image_results(logits, labels)
        weights = None if self.class_weights is None else self.class_weights[labels]
        loss = nll(results) if weights is None else float(np.average(results.nll, weights=weights))
        return loss, top1(results)

    def logits(self, parameters: Floats) -> Float32s:
        return linear_logits(self.rows, parameters)

    def start(self, weights: Floats) -> Floats:
        """Return the optimum for an infinite penalty: zero weights, and the logarithms of the class shares as biases."""
        parameters = np.zeros((len(self._targets), self.rows.shape[1] + 1))
        parameters[:, -1] = np.log(np.maximum(self._class_mass(weights), 1e-3 / len(weights)))
        return parameters

    def objective(self, weights: Floats, l2: float) -> Objective:
        share = (weights / weights.sum()).astype(np.float32)  # (R,)
        present = (self._class_mass(weights) > 0).astype(np.float64)[:, None]  # the bias of an absent class would diverge to -inf
        penalty = np.full((1, self.rows.shape[1] + 1), l2)
        penalty[0, -1] = 0.0

        def evaluate(parameters: Floats) -> tuple[float, Floats, float]:
            self.passes += 1
            log_probs = _log_softmax_columns(np.ascontiguousarray(self.logits(parameters).T))  # (C, R)
            loss = -float(((log_probs * self._targets).sum(axis=0) * share).sum(dtype=np.float64))
            value = loss + 0.5 * float((penalty * parameters**2).sum())
            error = (np.exp(log_probs, out=log_probs) - self._targets) * share  # (C, R)
            slope = np.concatenate([error @ self.rows, error.sum(axis=1, keepdims=True)], axis=1)
            gradient = (slope.astype(np.float64) + penalty * parameters) * present
            # Strong convexity bounds the distance to the optimum by |gradient|² / (2 l2), approximately: the bias has no penalty.
            squared = float((gradient**2).sum())
            return value, gradient, squared / (2.0 * l2) if l2 > 0 else math.inf

        return evaluate

    def complete(self, parameters: Floats, weights: Floats) -> Floats:
        """Set the weights of classes without any row to zero, and their biases as if they had one of N + 1 images in all."""
        absent = self._class_mass(weights) == 0
        completed = parameters.copy()
        completed[absent, :-1] = 0.0
        biases = parameters[~absent, -1]
        total = biases.max() + math.log(float(np.exp(biases - biases.max()).sum()))
        completed[absent, -1] = total - math.log(float((weights > 0).sum()) + 1.0)
        return completed

    def _class_mass(self, weights: Floats) -> Floats:
        """Return the share (C,) of each class in the total weight of the rows."""
        return np.asarray(np.bincount(self.labels, weights=weights, minlength=len(self._targets)) / weights.sum())


def linear_logits(rows: Float32s, parameters: Floats) -> Float32s:
    """Return the logits (R, C) of rows (R, D); the last column of the parameters (C, D + 1) is the bias."""
    narrow = parameters.astype(np.float32)
    return np.asarray(rows @ narrow[:, :-1].T + narrow[:, -1])


def _log_softmax_columns(scores: Float32s) -> Float32s:
    """Convert scores (C, R) into log-probabilities over C, in place."""
    scores -= scores.max(axis=0)
    scores -= np.log(np.exp(scores).sum(axis=0))
    return scores


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
