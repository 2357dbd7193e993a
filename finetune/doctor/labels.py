"""Labels that are probably wrong: what a linear head on frozen features says of images that it was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.features.solve import solve_softmax_head

FOLDS = 5
LEAST_LIFT = 0.3  # of the way from always naming the largest class to being always right: below, the head knows nothing
LEAST_IMAGES = 50
LEAST_OF_A_CLASS = 5  # below, the head knows too little of a class to doubt anybody's word


@dataclass(frozen=True)
class Doubts:
    """What the head says of every sample, each by a fit that has not seen it.

    Args:
        confidence: (N,) probability of the label that was given.
        suggested: (N,) the most probable class.
        doubted: positions of the labels that are doubted, the least probable first.
    """

    confidence: NDArray[np.float64]
    suggested: NDArray[np.int64]
    doubted: tuple[int, ...]


def _above_majority(predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    largest = float(np.bincount(labels).max()) / len(labels)
    return (float((predicted == labels).mean()) - largest) / max(1 - largest, 1e-9)


def doubt_labels(samples: Sequence[Sample], embeddings: NDArray[np.float32], n_classes: int) -> Doubts | None:
    """Return which labels are doubted; None where there are too few images to doubt any.

    A label is doubted where another class is more probable, and as probable as that class is on average for images that have it
    (the rule of confident learning, Northcutt et al. 2021): classes that are hard to tell apart are not called wrong for it.
    """
    labels = np.array([sample.labels[0] for sample in samples])
    counts = np.bincount(labels, minlength=n_classes)
    if len(samples) < LEAST_IMAGES or (counts >= LEAST_OF_A_CLASS).sum() < 2:
        return None
    solved = solve_softmax_head(embeddings, labels, n_classes, folds=FOLDS)
    if solved.held_out_logits is None:
        return None
    logits = np.full((len(samples), n_classes), np.nan)
    logits[solved.held_out_images] = solved.held_out_logits
    held_out = ~np.isnan(logits[:, 0])
    probs = np.exp(logits - np.nanmax(logits, axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    rows = np.arange(len(samples))
    confidence = np.where(held_out, probs[rows, labels], 1.0)
    suggested = np.where(held_out, np.nan_to_num(probs).argmax(axis=1), labels)
    if _above_majority(suggested[held_out], labels[held_out]) < LEAST_LIFT:
        return Doubts(confidence, suggested.astype(np.int64), ())
    usual = np.array([probs[held_out & (labels == one), one].mean() if counts[one] else 2.0 for one in range(n_classes)])
    is_doubted = held_out & (suggested != labels) & (probs[rows, suggested] >= usual[suggested])
    is_doubted &= (counts[labels] >= LEAST_OF_A_CLASS) & (counts[suggested] >= LEAST_OF_A_CLASS)
    doubted = np.flatnonzero(is_doubted)
    order = doubted[np.argsort(confidence[doubted], kind="stable")]
    return Doubts(confidence, suggested.astype(np.int64), tuple(int(one) for one in order))
