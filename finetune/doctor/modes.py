"""Find classes that may be two: their embeddings form two separate groups, as if two kinds of things had one name.

Distances are measured in standard deviations within the other classes (linear discriminant analysis), that is, relative to the
usual variation within a class of this data. The two groups are found on half of the class and evaluated on the other half,
because 2-means separates any set of images that it is fitted to. NumPy alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST_IMAGES = 60
LEAST_SHARE = 0.15  # of the smaller group
APART = 5.0  # standard deviations between the groups; measured: classes of one kind up to 4.1, 60 of their images up to 4.9
DIRECTIONS = 24  # principal components in which groups are looked for
REPEATS, STARTS, ROUNDS = 3, 3, 12
SHRINKAGE = 1e-3

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Groups:
    """Two groups in one class.

    Args:
        label: of the class.
        apart: distance of the groups' means in standard deviations, on images that they were not fitted to.
        first, second: positions of their most typical samples, of the larger group first.
        share: of the smaller group.
    """

    label: int
    apart: float
    share: float
    first: tuple[int, ...]
    second: tuple[int, ...]


def classes_that_are_two(embeddings: NDArray[np.float32], labels: NDArray[np.int64], n_shown: int = 2) -> list[Groups]:
    """Return the classes whose images form two groups, largest distance first; empty if only one class is large."""
    labels = np.asarray(labels)
    components = _principal(embeddings)
    found = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        others = labels != label
        if len(members) < LEAST_IMAGES or others.sum() < LEAST_IMAGES:
            continue
        points = _whitened(components, labels, others)[members]
        apart = float(np.median([_held_out_distance(points, np.random.default_rng([int(label), one])) for one in range(REPEATS)]))
        if apart >= APART:
            found.append(_described(int(label), apart, members, points, n_shown))
    return sorted((one for one in found if one.share >= LEAST_SHARE), key=lambda one: -one.apart)


def _principal(embeddings: NDArray[np.float32]) -> Floats:
    centred = embeddings.astype(np.float64) - embeddings.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return np.asarray(centred @ vectors[:, ::-1][:, :DIRECTIONS])


def _whitened(components: Floats, labels: NDArray[np.int64], others: NDArray[np.bool_]) -> Floats:
    """Return the components, scaled so that the classes among `others` have unit variance in every direction."""
    left = np.concatenate([components[one] - components[one].mean(axis=0) for one in _rows(labels, others)])
    values, vectors = np.linalg.eigh(left.T @ left / len(left))
    return np.asarray(components @ vectors / np.sqrt(values + SHRINKAGE * values.mean() + 1e-12))


def _rows(labels: NDArray[np.int64], wanted: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    return [np.flatnonzero((labels == label) & wanted) for label in np.unique(labels[wanted])]


def _held_out_distance(points: Floats, rng: np.random.Generator) -> float:
    """Find the groups on each half of the points; return the mean of their distances on the other half."""
    halves = np.array_split(rng.permutation(len(points)), 2)
    found = []
    for mine, other in (halves, halves[::-1]):
        first, second = _two_means(points[mine], rng)
        axis = (second - first) / max(float(np.linalg.norm(second - first)), 1e-12)
        found.append(_distance(np.sort((points[other] - (first + second) / 2) @ axis)))
    return float(np.mean(found))


def _distance(values: Floats) -> float:
    """Divide sorted values so that the variance within both parts is smallest; return their distance in standard deviations."""
    n = len(values)
    count = np.arange(max(int(LEAST_SHARE * n), 1), min(int((1 - LEAST_SHARE) * n), n - 1)) + 1
    total = np.cumsum(values)
    apart = (total[-1] - total[count - 1]) / (n - count) - total[count - 1] / count
    between = count * (n - count) / n**2 * apart**2
    best = int(between.argmax())
    return float(apart[best] / np.sqrt(max(float(values.var() - between[best]), 1e-12)))


def _two_means(points: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Return the centres of 2-means, the best of a few initialisations."""
    best, least = (points[0], points[-1]), np.inf
    for _ in range(STARTS):
        centres = points[[int(rng.integers(len(points)))] * 2].copy()
        far = np.square(points - centres[0]).sum(axis=1)
        centres[1] = points[int(rng.choice(len(points), p=far / far.sum()))] if far.sum() > 0 else points[0]
        for _ in range(ROUNDS):
            squares = np.square(points[:, None] - centres).sum(axis=2)  # (N, 2)
            nearest = squares.argmin(axis=1)
            centres = np.stack(
                [points[nearest == one].mean(axis=0) if (nearest == one).any() else centres[one] for one in (0, 1)]
            )
        if (loss := float(squares.min(axis=1).sum())) < least:
            best, least = (centres[0], centres[1]), loss
    return best


def _described(label: int, apart: float, members: NDArray[np.int64], points: Floats, n_shown: int) -> Groups:
    centres = np.stack(_two_means(points, np.random.default_rng(label)))
    squares = np.square(points[:, None] - centres).sum(axis=2)
    nearest = squares.argmin(axis=1)
    order = sorted((0, 1), key=lambda one: -int((nearest == one).sum()))
    typical = [np.argsort(np.where(nearest == group, squares[:, group], np.inf))[:n_shown] for group in order]
    first, second = (tuple(int(members[one]) for one in of_group) for of_group in typical)
    return Groups(label, apart, float((nearest == order[1]).mean()), first, second)
