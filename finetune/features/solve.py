"""The head, solved: multinomial logistic regression on frozen features, with the L2 strength chosen on held-out data.

With the backbone frozen, the best linear head is the minimum of a convex function, so it is computed instead of stepped
towards: L-BFGS on standardised features, warm-started along a path of L2 strengths. The standardisation is folded into the
returned weights, which makes them an ordinary linear layer on raw features: the class activation map of the exported head
stays exact.

Training, validation and cross-validation folds are one matrix with different row weights; a held-out row is a row of weight zero.
Knows matrices and labels; does not know where the features come from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.errors import TrainingError
from finetune.model.threads import on_threads

# Strong to weak, two a decade, in units of the mean loss: scikit-learn's C is 1 / (l2 * N).
L2_PATH = tuple(float(10.0**exponent) for exponent in np.arange(1.0, -5.1, -0.5))
L2_WITHOUT_EVIDENCE = 0.1  # too few images to hold any out
PATIENCE = (
    2  # the path ends when this many strengths in a row are worse than the best: the weak end is slow and never wins from there
)
PATH_TOLERANCE = 1e-3  # relative to the optimum; validation loss no longer moves in its third digit
FINAL_TOLERANCE = 1e-6
SMALLEST_GRADIENT = 1e-6  # below this, float32 sums cannot tell the gradient from zero
MAX_ITERATIONS = 1000
CHUNK_ROWS = 4096
ONE_THREAD_ELEMENTS = 2**25  # 128 MiB of features; up to there, threads wait for each other for longer than they help


@dataclass(frozen=True)
class PathPoint:
    """One L2 strength that was tried: its loss and accuracy on rows that it was not fitted on."""

    l2: float
    val_nll: float
    val_score: float  # of the headline metric of the task


@dataclass(frozen=True)
class SolvedHead:
    """A solved head and the evidence for it."""

    weight: NDArray[np.float32]  # (C, D), for raw features
    bias: NDArray[np.float32]  # (C,)
    l2: float
    chosen_by: Literal["given", "validation", "cross-validation", "default"]
    path: tuple[PathPoint, ...]
    held_out_logits: NDArray[np.float32] | None  # (H, C), each row from a fit that did not see it
    held_out_images: NDArray[np.int64]  # (H,) indices into val, or into the training images under cross-validation
    iterations: int  # passes over the features, path and final fit together
    gradient_norm: float  # at the solution, in standardised space
    converged: bool
    seconds: float

    def logits(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """(N, D) -> (N, C)"""
        return np.asarray(features @ self.weight.T + self.bias, dtype=np.float32)


def solve_softmax_head(
    features: NDArray[np.floating],
    labels: NDArray[np.integer],
    num_classes: int,
    *,
    val_features: NDArray[np.floating] | None = None,
    val_labels: NDArray[np.integer] | None = None,
    l2: float | None = None,
    label_smoothing: float = 0.0,
    class_weights: NDArray[np.floating] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> SolvedHead:
    """Fit softmax(W x + b) to `labels`.

    Args:
        features: (N, D), or (N, K, D) for K views of each image; view 0 is the one that evaluation sees. Views of one image
            share its weight and are held out together.
        labels: (N,) in [0, num_classes).
        val_features: (M, D). Without them the L2 strength is chosen by `folds`-fold cross-validation over `features`.
        l2: strength of (l2 / 2) * |W|² on standardised features beside the mean loss; None chooses it.
        class_weights: (C,) multiplies the weight of each row by its class's; see `balanced_class_weights`.

    Raises:
        TrainingError: features that are not finite.
    """
    started = time.perf_counter()
    views = features.shape[1] if features.ndim == 3 else 1
    n_train, n_val = len(labels) * views, 0 if val_features is None else len(val_features)
    with on_threads(1 if features.size <= ONE_THREAD_ELEMENTS else torch.get_num_threads()):
        matrix = _standardise(features.reshape(n_train, -1), val_features)
        row_labels = torch.from_numpy(np.repeat(labels, views).astype(np.int64))
        if val_labels is not None:
            row_labels = torch.cat([row_labels, torch.from_numpy(val_labels.astype(np.int64))])
        problem = _Problem(matrix.rows, row_labels, num_classes, label_smoothing)
        all_weights = _row_weights(row_labels, views, n_train, class_weights)
        weights = all_weights * (torch.arange(n_train + n_val) < n_train)

        splits: list[_Split] = []
        if l2 is None and n_val:
            splits = [_Split(weights, torch.arange(n_train, n_train + n_val))]
        elif l2 is None:
            splits = _fold_splits(labels, weights, views, folds, seed)
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


def balanced_class_weights(labels: NDArray[np.integer], num_classes: int) -> NDArray[np.float64]:
    """(C,) inverse class frequencies, one on average over the rows; an absent class gets zero."""
    counts = np.bincount(labels, minlength=num_classes).astype(np.float64)
    weights = np.divide(1.0, counts, out=np.zeros_like(counts), where=counts > 0)
    return weights * (len(labels) / max(float((weights * counts).sum()), 1.0))


@dataclass(frozen=True)
class _Split:
    """Row weights to fit with, and the rows to judge on."""

    weights: Tensor  # (rows,) float32, sums to one; zero where held out
    held_out: Tensor  # indices of rows


def _row_weights(row_labels: Tensor, views: int, n_train: int, class_weights: NDArray[np.floating] | None) -> Tensor:
    """An image weighs one, whatever the number of its views, times its class's weight."""
    weights = torch.ones(len(row_labels), dtype=torch.float64)
    weights[:n_train] /= views
    if class_weights is not None:
        weights *= torch.from_numpy(np.asarray(class_weights, dtype=np.float64))[row_labels]
    return weights


def _fold_splits(labels: NDArray[np.integer], row_weights: Tensor, views: int, folds: int, seed: int) -> list[_Split]:
    """Stratified folds over images. A class with one image is never held out: nothing could be learnt about it elsewhere."""
    fold_of_image = np.full(len(labels), -1)
    generator = np.random.default_rng(seed)
    dealt = 0  # folds are dealt round robin across classes, so that small classes do not all land in the first folds
    for members in (np.flatnonzero(labels == label) for label in np.unique(labels)):
        if len(members) > 1:
            fold_of_image[generator.permutation(members)] = (dealt + np.arange(len(members))) % folds
            dealt += len(members)
    fold_of_row = torch.from_numpy(np.repeat(fold_of_image, views))
    first_views = torch.arange(len(labels)) * views
    return [
        _Split(row_weights * (fold_of_row != fold), first_views[torch.from_numpy(fold_of_image == fold)])
        for fold in range(folds)
        if (fold_of_image == fold).any()
    ]


def _held_out_images(splits: Sequence[_Split], views: int) -> NDArray[np.int64]:
    rows = [split.held_out for split in splits]
    return (torch.cat(rows).sort().values // views).numpy() if rows else np.empty(0, dtype=np.int64)


def _walk_path(problem: _Problem, splits: Sequence[_Split]) -> tuple[list[PathPoint], NDArray[np.float32] | None, Tensor | None]:
    """Try the strengths from strong to weak on every split.

    Returns: the points; the best point's held-out logits in the order of rows, and its parameters on the first split.
    """
    path: list[PathPoint] = []
    if not splits:
        return path, None, None
    trails: list[list[Tensor]] = [[problem.start(split.weights)] for split in splits]
    rows = torch.cat([split.held_out for split in splits])
    labels = problem.labels[rows]
    best_logits = best_start = None
    for l2 in L2_PATH:
        for split, trail in zip(splits, trails, strict=True):
            found = minimise(problem.objective(split.weights, l2), _extrapolate(trail), PATH_TOLERANCE)
            trail[:] = [*trail[-1:], found.parameters]
        logits = torch.cat([problem.logits(trail[-1])[split.held_out] for split, trail in zip(splits, trails, strict=True)])
        nll = float(torch.nn.functional.cross_entropy(logits.double(), labels))
        path.append(PathPoint(l2, nll, float((logits.argmax(dim=1) == labels).double().mean())))
        best = min(range(len(path)), key=lambda index: path[index].val_nll)
        if best == len(path) - 1:
            best_logits, best_start = logits[rows.argsort()].numpy(), trails[0][-1]
        if len(path) - 1 - best >= PATIENCE:
            break
    return path, best_logits, best_start


def _extrapolate(trail: Sequence[Tensor]) -> Tensor:
    """The solution moves smoothly with log(l2): go on by as much as the last step, which halves the passes."""
    return trail[-1] if len(trail) < 2 else 2 * trail[-1] - trail[-2]


@dataclass(frozen=True)
class _Standardised:
    """The feature matrix with zero mean and unit variance over its training rows, and the way back.

    A feature that does not vary (up to float32 rounding) becomes zero, and so does its weight.
    """

    rows: Tensor  # (N*K + M, D) float32
    mean: Tensor  # (D,) float64
    inverse_std: Tensor  # (D,) float64, zero for a constant feature

    def fold(self, parameters: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(C, D + 1) for standardised rows -> weight (C, D) and bias (C,) for raw rows."""
        weight = parameters[:, :-1] * self.inverse_std
        bias = parameters[:, -1] - weight @ self.mean
        return weight.float().numpy(), bias.float().numpy()


def _standardise(train: NDArray[np.floating], val: NDArray[np.floating] | None) -> _Standardised:
    mean, inverse_std = _moments(train)
    parts = [train] if val is None else [train, val]
    rows = torch.empty(sum(len(part) for part in parts), train.shape[1], dtype=torch.float32)
    filled = 0
    for part in parts:
        for chunk in _chunks(part):
            rows[filled : filled + len(chunk)] = (chunk - mean) * inverse_std
            filled += len(chunk)
    finite = torch.cat([torch.isfinite(chunk).all(dim=1) for chunk in rows.split(CHUNK_ROWS)])  # at once it would copy the matrix
    if not bool(finite.all()):
        broken = torch.nonzero(~finite).flatten()
        raise TrainingError(
            f"{len(broken)} of {len(rows)} feature rows are not finite (first: {broken[:5].tolist()}). "
            "Check the weights file, or try compute.precision=float32"
        )
    return _Standardised(rows, mean, inverse_std)


def _moments(matrix: NDArray[np.floating]) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each column, (D,) float64; two passes, since one loses the variance to cancellation."""
    mean = torch.stack([chunk.sum(dim=0) for chunk in _chunks(matrix)]).sum(dim=0) / len(matrix)
    std = (torch.stack([((chunk - mean) ** 2).sum(dim=0) for chunk in _chunks(matrix)]).sum(dim=0) / len(matrix)).sqrt()
    largest = torch.stack([chunk.abs().amax(dim=0) for chunk in _chunks(matrix)]).amax(dim=0)
    constant = std <= 1e-6 * largest
    return mean, torch.where(constant, 0.0, 1.0 / torch.where(constant, 1.0, std))


def _chunks(matrix: NDArray[np.floating]) -> Iterator[Tensor]:
    """The rows in float64, a few thousand at a time: the whole matrix may not fit into memory twice."""
    for first in range(0, len(matrix), CHUNK_ROWS):
        yield torch.from_numpy(np.asarray(matrix[first : first + CHUNK_ROWS], dtype=np.float64))


Objective = Callable[[Tensor], tuple[float, Tensor, float]]  # parameters -> value, gradient, bound on the distance to the optimum


class _Problem:
    """Smoothed cross-entropy over one matrix. Parameters are (C, D + 1) float64; the last column is the unpenalised bias."""

    def __init__(self, rows: Tensor, labels: Tensor, num_classes: int, label_smoothing: float) -> None:
        self.rows = rows  # (R, D) float32
        self.labels = labels  # (R,) int64
        self.passes = 0
        self._targets = torch.full((num_classes, len(labels)), label_smoothing / num_classes)
        self._targets[labels, torch.arange(len(labels))] += 1.0 - label_smoothing

    def logits(self, parameters: Tensor) -> Tensor:
        """(R, C) float32"""
        narrow = parameters.float()
        return torch.addmm(narrow[:, -1], self.rows, narrow[:, :-1].T)

    def start(self, weights: Tensor) -> Tensor:
        """The optimum under infinite l2: zero weights, log of the class shares as bias."""
        parameters = torch.zeros(len(self._targets), self.rows.shape[1] + 1, dtype=torch.float64)
        parameters[:, -1] = torch.log(self._class_mass(weights).clamp_min(1e-3 / len(weights)))
        return parameters

    def objective(self, weights: Tensor, l2: float) -> Objective:
        """Weighted mean loss + (l2 / 2) |W|² as a function of the parameters."""
        share = (weights / weights.sum()).float()  # (R,)
        present = (self._class_mass(weights) > 0).double()[:, None]  # an absent class has no optimum: its bias would run to -inf
        penalty = torch.full((1, self.rows.shape[1] + 1), l2, dtype=torch.float64)
        penalty[0, -1] = 0.0

        def evaluate(parameters: Tensor) -> tuple[float, Tensor, float]:
            self.passes += 1
            # Classes by rows: log_softmax over the slow axis is vectorised, over the fast one it is 15 times slower.
            log_probs = torch.log_softmax(self.logits(parameters).T.contiguous(), dim=0)
            loss = -float(((log_probs * self._targets).sum(dim=0) * share).sum(dtype=torch.float64))
            value = loss + 0.5 * float((penalty * parameters**2).sum())
            error = (log_probs.exp_() - self._targets) * share  # (C, R)
            gradient = torch.cat([error @ self.rows, error.sum(dim=1, keepdim=True)], dim=1).double() + penalty * parameters
            gradient *= present
            # Strong convexity bounds the distance to the optimum by |gradient|² / (2 l2) (the bias, unpenalised, only roughly).
            squared = float((gradient**2).sum())
            return value, gradient, squared / (2.0 * l2) if l2 > 0 else math.inf

        return evaluate

    def complete(self, parameters: Tensor, weights: Tensor) -> Tensor:
        """Give classes without any row what one unseen image in all would earn them: no direction, and a small bias."""
        absent = self._class_mass(weights) == 0
        completed = parameters.clone()
        completed[absent, :-1] = 0.0
        completed[absent, -1] = torch.logsumexp(parameters[~absent, -1], dim=0) - math.log(float((weights > 0).sum()) + 1.0)
        return completed

    def _class_mass(self, weights: Tensor) -> Tensor:
        """(C,) float64: the share of the total weight that each class's own rows carry."""
        return torch.zeros(len(self._targets), dtype=torch.float64).index_add_(0, self.labels, weights) / weights.sum()


@dataclass(frozen=True)
class Minimum:
    parameters: Tensor
    value: float
    gradient_norm: float
    iterations: int
    converged: bool


def minimise(objective: Objective, start: Tensor, tolerance: float, *, memory: int = 10) -> Minimum:
    """L-BFGS with backtracking, until the value is certainly within `tolerance` (relative) of the optimum."""
    point = start
    value, gradient, gap = objective(point)
    steps: list[tuple[Tensor, Tensor]] = []  # (change of point, change of gradient), newest last
    iterations = 0
    while not (solved := gap <= tolerance * abs(value) or float(gradient.abs().max()) <= SMALLEST_GRADIENT):
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
    return Minimum(point, value, float(gradient.norm()), iterations, solved)


def _two_loop(gradient: Tensor, steps: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The quasi-Newton step (to be subtracted): Nocedal & Wright, Numerical Optimization, algorithm 7.4."""
    if not steps:
        return gradient / max(1.0, float(gradient.norm()))
    direction = gradient.clone()
    alphas = []
    for change, bend in reversed(steps):
        alpha = (change * direction).sum() / (change * bend).sum()
        direction -= alpha * bend
        alphas.append(alpha)
    newest_change, newest_bend = steps[-1]
    direction *= (newest_change * newest_bend).sum() / (newest_bend * newest_bend).sum()
    for (change, bend), alpha in zip(steps, reversed(alphas), strict=True):
        direction += change * (alpha - (bend * direction).sum() / (change * bend).sum())
    return direction


def _backtrack(
    objective: Objective, point: Tensor, value: float, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, float, Tensor, float] | None:
    """The first of the steps 1, 1/2, 1/4 … that decreases the value enough; None when rounding leaves nothing to gain."""
    slope = float((gradient * direction).sum())
    for halvings in range(30):
        step = 0.5**halvings
        candidate = point - step * direction
        new_value, new_gradient, gap = objective(candidate)
        if new_value <= value - 1e-4 * step * slope:
            return candidate, new_value, new_gradient, gap
    return None
