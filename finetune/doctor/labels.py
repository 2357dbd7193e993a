"""Find labels that are probably wrong: predictions of a linear head on frozen features for images that it was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Sample, targets_of
from finetune.features.left_out import DoubtedLabels, doubted_decisions, doubts_by_image
from finetune.features.sigmoid_head import solve_sigmoid_head
from finetune.features.softmax_head import solve_softmax_head
from finetune.metrics.labels import sigmoid
from finetune.tasks import task_named

FOLDS = 5
LEAST_LIFT = 0.3  # accuracy above always predicting the largest class, as a share of what is possible; below, nothing is doubted
LEAST_IMAGES = 50
MOST_OWN = 0.2  # with any number of labels per image: the probability of a decision as given, up to which it is doubted
LEAST_OF_A_CLASS = 5  # below, too little is known of a class to doubt a label


@dataclass(frozen=True)
class Doubts:
    """The head's predictions for every sample, each by a fit that has not seen it.

    Args:
        confidence: (N,) probability of the given label.
        suggested: (N,) the most probable class.
        doubted: positions of the labels that are doubted, the least probable first.
    """

    confidence: NDArray[np.float64]
    suggested: NDArray[np.int64]
    doubted: tuple[int, ...]


@dataclass(frozen=True)
class LabelSetDoubts:
    """The same for samples with any number of labels.

    Args:
        confidence: (N,) probability of the least probable of a sample's decisions, label by label, as they are given.
        doubted: the samples with doubted labels, the least probable first.
    """

    confidence: NDArray[np.float64]
    doubted: tuple[DoubtedLabels, ...]


def _above_majority(predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    largest = float(np.bincount(labels).max()) / len(labels)
    return (float((predicted == labels).mean()) - largest) / max(1 - largest, 1e-9)


def doubt_labels(samples: Sequence[Sample], embeddings: NDArray[np.float32], n_classes: int) -> Doubts | None:
    """Return which labels are doubted; None if there are too few images to doubt any.

    A label is doubted if another class is more probable, and at least as probable as that class is on average for its own images
    (the rule of confident learning, Northcutt et al. 2021). So a label is not doubted only because two classes are hard to tell
    apart.
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


def doubt_label_sets(samples: Sequence[Sample], embeddings: NDArray[np.float32], n_classes: int) -> LabelSetDoubts | None:
    """Return which labels are doubted if samples may have any number of them; None if there are too few images to doubt any.

    The rule of `doubt_labels` is applied to each label by itself, with the images that have it and those that do not as the two
    classes. The given decision must also be improbable (`MOST_OWN`), because the labels of an image are many decisions.
    """
    targets = task_named("multilabel").encode(targets_of(samples), n_classes)
    given = targets.astype(bool)
    known = (given.sum(axis=0) >= LEAST_OF_A_CLASS) & ((~given).sum(axis=0) >= LEAST_OF_A_CLASS)
    if len(samples) < LEAST_IMAGES or not known.any():
        return None
    solved = solve_sigmoid_head(embeddings, targets, n_classes, folds=FOLDS)
    if solved.held_out_logits is None:
        return None
    held_out = np.asarray(solved.held_out_images)
    probs = sigmoid(solved.held_out_logits.astype(np.float64))
    wrong, missing = doubted_decisions(probs, given[held_out], known)
    own = np.where(given[held_out], probs, 1.0 - probs)
    confidence = np.ones(len(samples))
    confidence[held_out] = own.min(axis=1)
    return LabelSetDoubts(
        confidence, tuple(doubts_by_image(own, wrong & (own <= MOST_OWN), missing & (own <= MOST_OWN), held_out))
    )
