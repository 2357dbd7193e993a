"""How unlike known images a new one is: what of its embedding lies outside the directions in which theirs vary.

Embeddings are scaled to length one (which makes distances in feature space comparable between images: Müller & Hein 2025,
arXiv:2505.18032); a principal subspace is fitted to those of known images; the score of a new one is the squared length of what
that subspace leaves of it (PCA reconstruction error: Guan et al. 2023, "Revisit PCA-based technique for out-of-distribution
detection", ICCV). It takes a mean and a few directions, so no image needs to be kept. ``benchmarks/README.md`` has its figures
beside those of other scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.rows import Floats

N_COMPONENTS = 16
IMAGES_PER_COMPONENT = 4  # fewer images than this for each direction would describe themselves only
FEATURES_PER_COMPONENT = 4  # a subspace that is nearly everything leaves nothing of any image
MAX_IMAGES = 1000  # more change the directions little, and cost more
N_PARTS = 5
_NO_SPREAD = 1e-9  # squared length, of embeddings that have length one


@dataclass(frozen=True)
class Subspace:
    """Where the embeddings of known images lie."""

    mean: NDArray[np.float32]  # (D,)
    components: NDArray[np.float32]  # (K, D) orthonormal rows

    def distances(self, embeddings: NDArray[np.floating[Any]]) -> Floats:
        """Return how far each of (N, D) embeddings is from the subspace: (N,), 0 or more."""
        centred = _unit_length(embeddings) - self.mean.astype(np.float64)
        inside = centred @ self.components.T.astype(np.float64)
        return np.asarray(np.maximum(np.square(centred).sum(axis=1) - np.square(inside).sum(axis=1), 0.0))


def fit_subspace(embeddings: NDArray[np.floating[Any]]) -> Subspace:
    """Fit the subspace to (N, D) embeddings, N >= 2."""
    unit = _unit_length(embeddings)
    mean = unit.mean(axis=0)
    centred = unit - mean
    n_components = min(N_COMPONENTS, len(unit) // IMAGES_PER_COMPONENT, unit.shape[1] // FEATURES_PER_COMPONENT)
    if len(centred) <= centred.shape[1]:  # the smaller of the two matrices has the same directions
        spread, vectors = np.linalg.eigh(centred @ centred.T)
        directions = vectors[:, ::-1][:, :n_components].T @ centred
    else:
        spread, vectors = np.linalg.eigh(centred.T @ centred)
        directions = vectors[:, ::-1][:, :n_components].T
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    kept = spread[::-1][:n_components] > _NO_SPREAD  # equal embeddings vary in no direction
    return Subspace(mean.astype(np.float32), (directions[kept] / lengths[kept]).astype(np.float32))


def known_images(n: int) -> NDArray[np.int64]:
    """Return the rows, of n, that a subspace is fitted to: evenly spread, and so over the classes."""
    return np.linspace(0, n - 1, min(n, MAX_IMAGES)).round().astype(np.int64)


def held_out_distances(embeddings: NDArray[np.floating[Any]]) -> Floats:
    """Return the distance of each image from a subspace that was fitted without it: `N_PARTS` times to all other parts."""
    part = np.arange(len(embeddings)) % N_PARTS
    distances = np.empty(len(embeddings))
    for number in range(N_PARTS):
        distances[part == number] = fit_subspace(embeddings[part != number]).distances(embeddings[part == number])
    return distances


def _unit_length(embeddings: NDArray[np.floating[Any]]) -> Floats:
    values = embeddings.astype(np.float64)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.where(lengths > 0, lengths, 1.0))
