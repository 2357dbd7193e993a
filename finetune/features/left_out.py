"""Labels that are probably wrong, from frozen features that are known: leave-one-out predictions of a ridge classifier.

The prediction for an image by the classifier that was fitted without it has a closed form (PRESS, Allen 1974), so that all images
take one inverse of a (D, D) matrix. This is much less than the examination in `finetune.doctor.labels` takes, and is for training
jobs, which have the features. Uses NumPy only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.runtime.blas import blas_threads_for

RIDGE = 0.5  # penalty on standardised features, per image; measured: 0.3 to 1 rank wrong labels equally well
LEAST_IMAGES = 50
LEAST_OF_A_CLASS = 5  # below, too little is known of a class to doubt a label
LEAST_LIFT = 0.3  # accuracy above always naming the largest class, as a share of what is possible; below, nothing is doubted
MOST_OWN = 0.1  # leave-one-out score of the given label up to which it is doubted; a score of 1 is certain, of 0 ruled out
_CHUNK_ROWS = 4096

Features = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class DoubtedLabel:
    """A label that is probably wrong."""

    row: int
    suggested: int  # class index
    own_score: float  # leave-one-out score of the given label; about 0 to 1


@dataclass(frozen=True)
class DoubtedLabels:
    """The labels of one image that are probably wrong, in data with any number of labels per image."""

    row: int
    wrong: tuple[int, ...]  # class indices of labels that the image has, and probably should not have
    missing: tuple[int, ...]  # class indices of labels that it probably lacks
    own_score: float  # the lowest leave-one-out score of one of these decisions as given; about 0 to 1


def doubted_labels(parts: Sequence[Features], labels: NDArray[np.integer[Any]], n_classes: int) -> list[DoubtedLabel]:
    """Return the labels that are doubted, the least probable first; empty if there are too few images to doubt any.

    A label is doubted if its leave-one-out score is at most `MOST_OWN` and another class has a score as high as that class has on
    average for its own images (the rule of confident learning, Northcutt et al. 2021).

    Args:
        parts: features (n, D) of consecutive parts of the images.
        labels: (N,) class indices of all parts together.
    """
    counts = np.bincount(labels, minlength=n_classes)
    if len(labels) < LEAST_IMAGES or (counts >= LEAST_OF_A_CLASS).sum() < 2:
        return []
    with blas_threads_for(sum(part.size for part in parts)):
        scores = left_out_scores(parts, np.eye(n_classes, dtype=np.float32)[labels])
    if not np.isfinite(scores).all():
        return []
    rows, suggested = np.arange(len(labels)), scores.argmax(axis=1)
    share = counts.max() / len(labels)
    if ((suggested == labels).mean() - share) / max(1 - share, 1e-9) < LEAST_LIFT:
        return []
    usual = np.array([scores[labels == one, one].mean() if counts[one] else np.inf for one in range(n_classes)])
    own = scores[rows, labels]
    known = (counts[labels] >= LEAST_OF_A_CLASS) & (counts[suggested] >= LEAST_OF_A_CLASS)
    doubted = np.flatnonzero(known & (suggested != labels) & (own <= MOST_OWN) & (scores[rows, suggested] >= usual[suggested]))
    order = doubted[np.argsort(own[doubted], kind="stable")]
    return [DoubtedLabel(int(row), int(suggested[row]), float(own[row])) for row in order]


def doubted_label_sets(parts: Sequence[Features], targets: NDArray[Any]) -> list[DoubtedLabels]:
    """Return the images with labels that are doubted, the least probable first, for data with any number of labels per image.

    Every label is a decision of its own. It is doubted if its leave-one-out score is at most `MOST_OWN` and the opposite decision
    is as probable as it is on average for the images for which it is the right one.

    Args:
        parts: features (n, D) of consecutive parts of the images.
        targets: (N, C) of all parts together, 1 where a label applies.
    """
    given = np.asarray(targets, bool)
    if len(given) < LEAST_IMAGES:
        return []
    scores = left_out_scores(parts, given.astype(np.float32))
    if not np.isfinite(scores).all():
        return []
    known = (given.sum(axis=0) >= LEAST_OF_A_CLASS) & ((~given).sum(axis=0) >= LEAST_OF_A_CLASS)
    wrong, missing = doubted_decisions(scores, given, known)
    own = np.where(given, scores, 1.0 - scores)
    return doubts_by_image(own, wrong & (own <= MOST_OWN), missing & (own <= MOST_OWN))


def doubted_decisions(
    scores: NDArray[np.floating[Any]], given: NDArray[np.bool_], known: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which given labels are probably wrong and which labels are probably missing, both (N, C).

    Args:
        scores: (N, C) held-out scores of each label, 0 to 1.
        known: (C,) the labels with enough images to doubt any. Of these, only labels that the scores rank clearly better than
            chance (`LEAST_LIFT`) are checked.
    """
    checked = known & (_lifts(scores, given) >= LEAST_LIFT)
    n_present, n_absent = np.maximum(given.sum(axis=0), 1), np.maximum((~given).sum(axis=0), 1)
    usual_present = np.where(given, scores, 0.0).sum(axis=0) / n_present  # (C,)
    usual_absent = np.where(given, 0.0, scores).sum(axis=0) / n_absent
    wrong = checked & given & (scores < 0.5) & (scores <= usual_absent)
    missing = checked & ~given & (scores > 0.5) & (scores >= usual_present)
    return wrong, missing


def _lifts(scores: NDArray[np.floating[Any]], given: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return (C,) average precision of each label above that of random scores, as a share of what is possible."""
    share = given.mean(axis=0)
    found = np.zeros(given.shape[1])
    for label in np.flatnonzero((share > 0) & (share < 1)):
        ranked = given[np.argsort(-scores[:, label], kind="stable"), label]
        precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
        found[label] = (precision[ranked].mean() - share[label]) / (1.0 - share[label])
    return found


def doubts_by_image(
    own: NDArray[np.floating[Any]],
    wrong: NDArray[np.bool_],
    missing: NDArray[np.bool_],
    positions: NDArray[np.integer[Any]] | None = None,
) -> list[DoubtedLabels]:
    """Return the doubts of each image that has some, the lowest score first.

    Args:
        own: (N, C) scores of the decisions as given.
        wrong, missing: (N, C), as `doubted_decisions` returns them.
        positions: (N,) the images that the rows belong to; by default their numbers.
    """
    found: dict[int, list[int]] = defaultdict(list)
    for row, label in zip(*np.nonzero(wrong | missing), strict=True):
        found[int(row)].append(int(label))
    doubts = [
        DoubtedLabels(
            row if positions is None else int(positions[row]),
            tuple(label for label in labels if wrong[row, label]),
            tuple(label for label in labels if missing[row, label]),
            float(own[row, labels].min()),
        )
        for row, labels in found.items()
    ]
    return sorted(doubts, key=lambda doubt: (doubt.own_score, doubt.row))


def left_out_scores(parts: Sequence[Features], targets: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the prediction (N, C) for each image of a ridge regression on `targets` (N, C) that was fitted without it."""
    n = len(targets)
    mean = sum(part.sum(axis=0, dtype=np.float64) for part in parts) / n
    variance = sum(np.square(part - mean).sum(axis=0, dtype=np.float64) for part in parts) / n
    scale = np.where(variance > 0, 1.0 / np.sqrt(np.where(variance > 0, variance, 1.0)), 0.0)

    def rows() -> Iterator[tuple[slice, NDArray[np.float32]]]:
        first = 0
        for part in parts:
            for start in range(0, len(part), _CHUNK_ROWS):
                chunk = ((part[start : start + _CHUNK_ROWS] - mean) * scale).astype(np.float32)
                yield slice(first, first + len(chunk)), chunk
                first += len(chunk)

    n_features = parts[0].shape[1]
    gram, moments = np.zeros((n_features, n_features), np.float32), np.zeros((n_features, targets.shape[1]), np.float32)
    centre = targets.mean(axis=0)
    for where, chunk in rows():
        gram += chunk.T @ chunk
        moments += chunk.T @ (targets[where] - centre)
    gram[np.diag_indices(n_features)] += RIDGE * n
    inverse = np.linalg.inv(gram)
    weights = inverse @ moments
    found = np.empty_like(targets)
    for where, chunk in rows():
        leverage = np.einsum("nd,nd->n", chunk @ inverse, chunk) + 1.0 / n  # of each image on its own prediction
        residual = targets[where] - centre - chunk @ weights
        found[where] = targets[where] - residual / (1.0 - leverage)[:, None]
    return found
