"""Solve the head of the multilabel task: one logistic regression for each label, all computed together.

The labels share only the L2 penalty: the one with the lowest mean loss over all labels is chosen. Uses NumPy only.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.features.lbfgs import Floats, Objective
from finetune.features.solve import SolvedHead, linear_logits, solve_head
from finetune.features.standardise import Float32s
from finetune.metrics.imbalance import rarest_label
from finetune.metrics.labels import binary_cross_entropy, label_results, mean_average_precision, nll


def solve_sigmoid_head(
    features: NDArray[np.floating[Any]],
    targets: NDArray[np.integer[Any]],
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
    """Fit sigmoid(W x + b) to `targets` (N, C), which are 1 where an image has the label.

    Args:
        l2: the penalty (l2 / 2) * |w|² is added to each label's mean loss; scikit-learn's C is 1 / (l2 * N).
        class_weights: (C,) weight of the images that have a label, in the fit and in the loss on held-out rows; the weight of the
            others is 1.
        features, val_features, image_weights, overwrite: see `finetune.features.softmax_head.solve_softmax_head`.

    Raises:
        TrainingError: some features are not finite.
    """

    def problem_of(rows: Float32s, row_targets: NDArray[Any]) -> _Problem:
        return _Problem(rows, row_targets, label_smoothing, class_weights)

    return solve_head(
        problem_of,
        features,
        targets,
        val_features=val_features,
        val_targets=val_targets,
        l2=l2,
        strata=rarest_label(targets),
        folds=folds,
        seed=seed,
        overwrite=overwrite,
        image_weights=image_weights,
    )


class _Problem:
    """The `finetune.features.solve.Problem` of binary cross entropy, summed over labels."""

    def __init__(
        self,
        rows: Float32s,
        targets: NDArray[Any],
        label_smoothing: float,
        class_weights: NDArray[np.floating[Any]] | None,
    ) -> None:
        self.rows = rows  # (R, D)
        self.targets = targets  # (R, C)
        self.passes = 0
        self._wanted = (targets.T * (1.0 - label_smoothing) + 0.5 * label_smoothing).astype(np.float32)  # (C, R)
        self._of_present = None if class_weights is None else np.asarray(class_weights, np.float32)[:, None]  # (C, 1)

    def row_weights(self, weights: Floats) -> Floats:
        return weights  # class weights apply to single labels here, not to rows: see `objective`

    def logits(self, parameters: Floats) -> Float32s:
        return linear_logits(self.rows, parameters)

    def start(self, weights: Floats) -> Floats:
        """Return the optimum for an infinite penalty: zero weights, and the log-odds of each label's share as bias."""
        parameters = np.zeros((len(self._wanted), self.rows.shape[1] + 1))
        present = self._share_present(weights)
        least = 1e-3 / len(weights)
        parameters[:, -1] = np.log(np.maximum(present, least)) - np.log(np.maximum(1.0 - present, least))
        return parameters

    def objective(self, weights: Floats, l2: float) -> Objective:
        share = (weights / weights.sum()).astype(np.float32)  # (R,)
        learnable = self._learnable(weights).astype(np.float64)[:, None]  # the bias of a constant label would diverge
        penalty = np.full((1, self.rows.shape[1] + 1), l2)
        penalty[0, -1] = 0.0

        def evaluate(parameters: Floats) -> tuple[float, Floats, float]:
            self.passes += 1
            logits = np.ascontiguousarray(self.logits(parameters).T)  # (C, R)
            small = np.exp(-np.abs(logits))
            absent_loss = np.maximum(logits, 0.0) + np.log1p(small)  # softplus
            present_loss = absent_loss - logits
            probs = np.where(logits >= 0, 1.0, small) / (1.0 + small)
            of_present = self._wanted if self._of_present is None else self._wanted * self._of_present
            of_absent = 1.0 - self._wanted
            losses = (of_present * present_loss + of_absent * absent_loss) * share * learnable.astype(np.float32)
            value = float(losses.sum(dtype=np.float64)) + 0.5 * float((penalty * parameters**2).sum())
            error = (probs * (of_present + of_absent) - of_present) * share  # (C, R)
            slope = np.concatenate([error @ self.rows, error.sum(axis=1, keepdims=True)], axis=1)
            gradient = (slope.astype(np.float64) + penalty * parameters) * learnable
            squared = float((gradient**2).sum())
            return value, gradient, squared / (2.0 * l2) if l2 > 0 else math.inf

        return evaluate

    def complete(self, parameters: Floats, weights: Floats) -> Floats:
        """Set the weights of labels that no image or every image has to zero, and their biases as if one more image differed."""
        completed = parameters.copy()
        constant = ~self._learnable(weights)
        n_seen = float((weights > 0).sum())
        completed[constant, :-1] = 0.0
        completed[constant, -1] = np.where(self._share_present(weights)[constant] > 0, 1.0, -1.0) * math.log(n_seen + 1.0)
        return completed

    def loss_and_metric(self, logits: Float32s, rows: NDArray[np.int64]) -> tuple[float, float]:
        results = label_results(logits, self.targets[rows])
        if self._of_present is None:
            return nll(results), mean_average_precision(results)
        weights = np.where(results.targets, self._of_present.T, 1.0)
        losses = binary_cross_entropy(results.logits, results.targets)
        return float((weights * losses).mean()), mean_average_precision(results)

    def _share_present(self, weights: Floats) -> Floats:
        """Return for each label (C,) the share of the images that have it, by weight."""
        return np.asarray(weights @ self.targets / weights.sum())

    def _learnable(self, weights: Floats) -> NDArray[np.bool_]:
        """Return for each label (C,) whether some images have it and some do not."""
        seen = self.targets[weights > 0]
        return np.asarray(seen.any(axis=0) & ~seen.all(axis=0))
