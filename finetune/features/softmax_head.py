"""Solve the head of the multiclass task: multinomial logistic regression, with label smoothing and class weights. NumPy only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.features.lbfgs import Floats, Objective
from finetune.features.solve import SolvedHead, linear_logits, solve_head
from finetune.features.standardise import Float32s
from finetune.metrics.accuracy import top1
from finetune.metrics.likelihood import nll
from finetune.metrics.rows import image_results


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


def _log_softmax_columns(scores: Float32s) -> Float32s:
    """Convert scores (C, R) into log-probabilities over C, in place."""
    scores -= scores.max(axis=0)
    scores -= np.log(np.exp(scores).sum(axis=0))
    return scores
