"""Choose images of a pool for labelling by uncertainty and diversity.

The embeddings are clustered by k-means, weighted by the model's uncertainty, and the image nearest to each centre is chosen
(CLUE: Prabhu et al. 2021, arXiv:2010.08666). CLUE measures uncertainty by the entropy. Here an image is uncertain if the margin
between the two highest probabilities is small; with several labels per image, if labels have probabilities near their thresholds.
benchmarks/README.md compares the gain with that of random choice and of other methods. Needs NumPy only; deterministic for equal
pools and seeds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 20  # of k-means, after which the centres hardly move
LEAST_WEIGHT = 1e-9  # of an image that the model is certain of, so that a pool without uncertain images works too

Floats = NDArray[np.floating]


def choose(uncertainty: Floats, embeddings: Floats, n: int, seed: int = 0) -> NDArray[np.int64]:
    """Return the indices of `n` different images, or of all if there are no more.

    Args:
        uncertainty: (N,) at least 0, such as 1 minus the margin.
        embeddings: (N, D).
    """
    if n >= len(uncertainty):
        return np.arange(len(uncertainty))
    points = unit(embeddings - embeddings.mean(axis=0))
    weights = uncertainty + LEAST_WEIGHT
    distances = _squared_distances(points, _centres(points, weights, n, np.random.default_rng(seed)))
    chosen: list[int] = []
    taken = np.zeros(len(points), bool)
    for column in distances.T:
        one = int(np.where(taken, np.inf, column).argmin())
        taken[one] = True
        chosen.append(one)
    return np.array(chosen)


def margins(probs: Floats) -> NDArray[np.float64]:
    """Return (N,) differences between the two highest probabilities; 0 is maximal uncertainty."""
    ordered = np.sort(probs, axis=1)
    second = ordered[:, -2] if ordered.shape[1] > 1 else 0.0
    return np.asarray(ordered[:, -1] - second, np.float64)


def label_margins(probs: Floats, thresholds: Floats) -> NDArray[np.float64]:
    """Return (N, C) distances of probabilities from thresholds (C,): 0 at the threshold, 1 at a probability of 0 or 1."""
    limits = np.clip(thresholds, 1e-6, 1 - 1e-6)
    return np.asarray(np.where(probs < limits, (limits - probs) / limits, (probs - limits) / (1 - limits)), np.float64)


def label_uncertainty(probs: Floats, thresholds: Floats) -> NDArray[np.float64]:
    """Return (N,) uncertainties of images with any number of labels: the mean over labels of 1 minus `label_margins`."""
    return np.asarray((1 - label_margins(probs, thresholds)).mean(axis=1), np.float64)


def unit(vectors: Floats) -> NDArray[np.float32]:
    """Return vectors (N, D) scaled to length one."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32)


def _centres(points: Floats, weights: Floats, n: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the centres (n, D) of weighted k-means with k-means++ initialisation."""
    first = int(rng.choice(len(points), p=weights / weights.sum()))
    starts = [first]
    nearest = _squared_distances(points, points[[first]])[:, 0]
    while len(starts) < n:
        share = nearest * weights
        share = share / share.sum() if share.sum() > 0 else weights / weights.sum()
        starts.append(int(rng.choice(len(points), p=share)))
        nearest = np.minimum(nearest, _squared_distances(points, points[[starts[-1]]])[:, 0])
    centres = points[starts].copy()
    for _ in range(ROUNDS):
        nearest = _squared_distances(points, centres).argmin(axis=1)
        member = np.zeros((n, len(points)), np.float32)
        member[nearest, np.arange(len(points))] = weights
        total = member.sum(axis=1, keepdims=True)
        centres = np.where(total > 0, member @ points / np.maximum(total, 1e-30), centres).astype(np.float32)
    return centres


def _squared_distances(points: Floats, centres: Floats) -> NDArray[np.float32]:
    """Return (N, K) squared distances of points (N, D) from centres (K, D)."""
    squares = (points**2).sum(axis=1)[:, None] - 2 * points @ centres.T + (centres**2).sum(axis=1)
    return np.asarray(np.maximum(squares, 0), np.float32)
