"""Which pictures of a pool to label: those that the model is unsure of, spread over all that it has not seen.

Clusters of embeddings in which a picture weighs as much as the model is unsure of it, and of each cluster the picture nearest to
its centre (CLUE: Prabhu et al. 2021, arXiv:2010.08666; unsure is here by the margin between the first two probabilities, where
they take the entropy). benchmarks/README.md says what it gains over labelling at random, and what other ways gain. NumPy alone;
equal pools and seeds give equal choices.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 20  # of moving the centres; they hardly move any more
LEAST_WEIGHT = 1e-9  # of a picture that the model is sure of, so that a pool without any doubt can be chosen from too

Floats = NDArray[np.floating]


def choose(probs: Floats, embeddings: Floats, n: int, seed: int = 0) -> NDArray[np.int64]:
    """Return the positions of `n` pictures (of all, where there are no more), none twice.

    Args:
        probs: (N, C) of classes that exclude each other.
        embeddings: (N, D).
    """
    if n >= len(probs):
        return np.arange(len(probs))
    points = unit(embeddings - embeddings.mean(axis=0))
    weights = 1 - margins(probs) + LEAST_WEIGHT
    distances = _squared_distances(points, _centres(points, weights, n, np.random.default_rng(seed)))
    chosen: list[int] = []
    taken = np.zeros(len(points), bool)
    for column in distances.T:
        one = int(np.where(taken, np.inf, column).argmin())
        taken[one] = True
        chosen.append(one)
    return np.array(chosen)


def margins(probs: Floats) -> NDArray[np.float64]:
    """(N,) what the most probable class has over the second: 0 where the model cannot tell them apart."""
    ordered = np.sort(probs, axis=1)
    second = ordered[:, -2] if ordered.shape[1] > 1 else 0.0
    return np.asarray(ordered[:, -1] - second, np.float64)


def unit(vectors: Floats) -> NDArray[np.float32]:
    """Return vectors (N, D) of length one."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32)


def _centres(points: Floats, weights: Floats, n: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the centres (n, D) of weighted k-means, begun as k-means++ does."""
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
        owner = _squared_distances(points, centres).argmin(axis=1)
        member = np.zeros((n, len(points)), np.float32)
        member[owner, np.arange(len(points))] = weights
        total = member.sum(axis=1, keepdims=True)
        centres = np.where(total > 0, member @ points / np.maximum(total, 1e-30), centres).astype(np.float32)
    return centres


def _squared_distances(points: Floats, centres: Floats) -> NDArray[np.float32]:
    """(N, D) and (K, D) to (N, K)"""
    squares = (points**2).sum(axis=1)[:, None] - 2 * points @ centres.T + (centres**2).sum(axis=1)
    return np.asarray(np.maximum(squares, 0), np.float32)
