"""Per-image results of single-label classification, from which its metrics are computed.

Sums are taken in float64 in a fixed order, so that equal logits give bit-equal metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import InvalidInput, TrainingError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_BLOCK_ROWS = 4096  # bounds the float64 copy of the logits; fixed, so that sums do not depend on memory


@dataclass(frozen=True)
class Rows:
    """The results of N images with `n_classes` classes."""

    n_classes: int
    targets: Integers  # (N,)
    predicted: Integers  # (N,) the class with the largest logit
    rank: Integers  # (N,) of the true class among the logits: 0 is best
    confidence: Floats  # (N,) probability of the predicted class
    nll: Floats  # (N,) negative log-likelihood of the true class, in nats
    brier: Floats  # (N,) squared distance of the probabilities from the one-hot truth, 0 to 2

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def score(self) -> Floats:
        """(N,) 1 for each image whose predicted class is correct, else 0. Top-1 accuracy is its mean."""
        return np.asarray(self.predicted == self.targets, np.float64)

    @cached_property
    def confusion(self) -> Integers:
        """(C, C) counts by true and predicted class."""
        cells = self.targets * self.n_classes + self.predicted
        return np.asarray(np.bincount(cells, minlength=self.n_classes**2).reshape(self.n_classes, self.n_classes), np.int64)

    @property
    def present(self) -> NDArray[np.bool_]:
        """(C,) whether the class has an image; means over classes leave the others out."""
        return np.asarray(self.confusion.sum(axis=1) > 0)


def image_results(logits: NDArray[np.floating[Any]], targets: NDArray[np.integer[Any]], beta: float = 1.0) -> Rows:
    """Compare logits (N, C) with class indices (N,).

    Args:
        beta: factor on the logits, the inverse of a temperature; it changes the probabilities but not the predicted classes.

    Raises:
        InvalidInput: no image, or shapes and targets that do not fit each other.
        TrainingError: a logit is NaN or infinite.
    """
    checked = check(logits, targets)
    starts = range(0, len(checked), _BLOCK_ROWS)
    parts = [_block_results(logits[i : i + _BLOCK_ROWS], checked[i : i + _BLOCK_ROWS], beta) for i in starts]
    return Rows(logits.shape[1], checked, *(np.concatenate(column) for column in zip(*parts, strict=True)))


def log_softmax(scores: Floats) -> Floats:
    """Return the log-softmax over classes of scores (N, C)."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), dtype=np.float64)


def check(logits: NDArray[np.floating[Any]], targets: NDArray[np.integer[Any]]) -> Integers:
    """Return the targets as int64, after checking shapes, range and finiteness; raises as `image_results` does."""
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise InvalidInput(
            f"cannot evaluate logits of shape {logits.shape} against targets of shape {targets.shape}: "
            "expected (images, classes) and (images,)"
        )
    n_classes = logits.shape[1]
    if not len(targets):
        raise InvalidInput("nothing to evaluate: the split holds no image. Give it some, or leave the split out")
    if targets.min() < 0 or targets.max() >= n_classes:
        raise InvalidInput(
            f"labels run from {targets.min()} to {targets.max()}; {n_classes} classes are numbered 0 to {n_classes - 1}"
        )
    bad_rows = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad_rows):
        raise TrainingError(
            f"{len(bad_rows)} of {len(targets)} images have NaN or infinite logits (first: row {bad_rows[0]}): "
            "the model diverged. Try a lower learning_rate, or float32 precision"
        )
    return targets.astype(np.int64)


def _block_results(
    logits: NDArray[np.floating[Any]], targets: Integers, beta: float
) -> tuple[Integers, Integers, Floats, Floats, Floats]:
    log_probs = log_softmax(logits.astype(np.float64) * beta)  # (B, C)
    every = np.arange(len(targets))
    predicted = logits.argmax(axis=1)  # ties go to the first class, here and in `rank`
    true_logit = logits[every, targets][:, None]
    ahead = (logits > true_logit) | ((logits == true_logit) & (np.arange(logits.shape[1]) < targets[:, None]))
    probs = np.exp(log_probs)
    confidence = probs[every, predicted]
    probs[every, targets] -= 1.0  # now the distance from the one-hot truth
    return predicted, ahead.sum(axis=1), confidence, -log_probs[every, targets], np.square(probs).sum(axis=1)
