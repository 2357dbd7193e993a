"""Find labels that are probably wrong: predictions of a linear head on frozen features for images that it was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.features.left_out import DoubtedLabels, doubted_decisions, doubts_by_image
from finetune.features.sigmoid_head import solve_sigmoid_head
from finetune.features.softmax_head import solve_softmax_head
from finetune.metrics.labels import sigmoid

FOLDS = 5
LEAST_LIFT = 0.3  # accuracy above always predicting the largest class, as a share of what is possible; below, nothing is doubted
MOST_DOUBTED = 0.25  # share of the labels; with more, it is the features that do not tell the classes apart
LEAST_IMAGES = 50
# With any number of labels per image: a decision is doubted if its probability is at most this.
_MOST_OWN_BY_IMAGE, _MOST_OWN_BY_OTHERS = 0.05, 0.1
LEAST_OF_A_CLASS = 5  # below, too little is known of a class to doubt a label
MOST_LABELS = 100  # up to which each label is also predicted from the others, at a cost quadratic in their number
_PRIOR_REMOVED = 0.5  # share of a label's log-odds in the data that is taken from its prediction where images are ranked
_LARGEST_LOGIT = 8.0


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
    why_none: str = ""  # why nothing is doubted although labels were looked at, as the end of a sentence


@dataclass(frozen=True)
class LabelSetDoubts:
    """The same for samples with any number of labels.

    Args:
        confidence: (N,) of the least probable of a sample's decisions, label by label, as they are given. It only ranks samples
            (0 to 1), because the frequency of each label is taken from it in part.
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
        return Doubts(confidence, suggested.astype(np.int64), (), "is hardly better than always naming the largest class")
    usual = np.array([probs[held_out & (labels == one), one].mean() if counts[one] else 2.0 for one in range(n_classes)])
    is_doubted = held_out & (suggested != labels) & (probs[rows, suggested] >= usual[suggested])
    is_doubted &= (counts[labels] >= LEAST_OF_A_CLASS) & (counts[suggested] >= LEAST_OF_A_CLASS)
    doubted = np.flatnonzero(is_doubted)
    if len(doubted) > MOST_DOUBTED * len(samples):
        return Doubts(confidence, suggested.astype(np.int64), (), f"contradicts {len(doubted):,} labels, too many to be mistakes")
    order = doubted[np.argsort(confidence[doubted], kind="stable")]
    return Doubts(confidence, suggested.astype(np.int64), tuple(int(one) for one in order))


def doubt_label_sets(samples: Sequence[Sample], embeddings: NDArray[np.float32], n_classes: int) -> LabelSetDoubts | None:
    """Return which labels are doubted if samples may have any number of them; None if there are too few images to doubt any.

    Each label is predicted twice by fits that have not seen the image: from its embedding, and from these predictions for all
    labels together with the other labels that the image is given. The second uses which labels occur together and which exclude
    each other, so it finds superfluous and missing labels; the first is not misled if one label was given in place of another.
    Images are ranked by the less favourable of both. A decision is doubted if one of them does, by the rule of `doubt_labels` for
    each label by itself, with the images that have it and those that do not as the two classes, and if that prediction also finds
    the decision as given improbable, because the labels of an image are many decisions.
    """
    targets = np.zeros((len(samples), n_classes), np.uint8)
    for row, sample in enumerate(samples):
        targets[row, list(sample.labels)] = 1
    given = targets.astype(bool)
    known = (given.sum(axis=0) >= LEAST_OF_A_CLASS) & ((~given).sum(axis=0) >= LEAST_OF_A_CLASS)
    if len(samples) < LEAST_IMAGES or not known.any():
        return None
    solved = solve_sigmoid_head(embeddings, targets, n_classes, folds=FOLDS)
    if solved.held_out_logits is None:
        return None
    held_out = np.asarray(solved.held_out_images)
    given = given[held_out]
    by_image = solved.held_out_logits.astype(np.float64)
    by_others = _given_the_others(by_image, given, known) if len(known) <= MOST_LABELS else by_image
    share = np.clip(targets.mean(axis=0), 1e-4, 1 - 1e-4)
    confidence = np.ones(len(samples))
    doubted, own = np.zeros_like(given), np.ones(given.shape)
    for logits, most in ((by_image, _MOST_OWN_BY_IMAGE), (by_others, _MOST_OWN_BY_OTHERS)):
        compared = logits - _PRIOR_REMOVED * np.log(share / (1 - share))
        lowest = sigmoid(np.where(given, compared, -compared)).min(axis=1)
        confidence[held_out] = np.minimum(confidence[held_out], lowest)
        probs = sigmoid(logits)
        wrong, missing = doubted_decisions(probs, given, known)
        of_these = np.where(given, probs, 1.0 - probs)
        doubted |= (wrong | missing) & (of_these <= most)
        own = np.minimum(own, of_these)
    return LabelSetDoubts(confidence, tuple(doubts_by_image(own, doubted & given, doubted & ~given, held_out)))


def _given_the_others(logits: NDArray[np.float64], given: NDArray[np.bool_], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return held-out logits (N, C) of each known label from those of all labels and from the other labels as they are given.

    Args:
        logits: (N, C) held-out logits, of which those of labels that are not known are returned unchanged.
        given: (N, C) the labels of each image.
    """
    own = np.clip(logits, -_LARGEST_LOGIT, _LARGEST_LOGIT).astype(np.float32)
    found = logits.copy()
    for label in np.flatnonzero(known):
        others = np.delete(given, label, axis=1).astype(np.float32)
        target = given[:, label, None].astype(np.int64)
        solved = solve_sigmoid_head(np.concatenate([own, others], axis=1), target, 1, folds=FOLDS)
        if solved.held_out_logits is not None:
            found[np.asarray(solved.held_out_images), label] = solved.held_out_logits[:, 0]
    return found
