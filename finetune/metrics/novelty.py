"""Novelty detection: the PCA reconstruction error of an image's embedding, relative to known images.

Embeddings are scaled to length one, which makes distances in feature space comparable between images (Müller & Hein 2025,
arXiv:2505.18032). A principal subspace is fitted to the embeddings of known images. The score of a new image is the squared
length of the residual of its embedding after projection onto that subspace (Guan et al. 2023, "Revisit PCA-based technique for
out-of-distribution detection", ICCV). Only a mean and a few directions are stored, no images. ``benchmarks/README.md`` compares
this score with others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.rows import Floats

N_COMPONENTS = 16
IMAGES_PER_COMPONENT = 4  # with fewer images per direction the subspace would fit these images only
FEATURES_PER_COMPONENT = 4  # in a subspace of nearly all dimensions every image has a residual near zero
MAX_IMAGES = 1000  # more images hardly change the directions
N_PARTS = 5
_NO_SPREAD = 1e-9  # squared length; the embeddings have length one


@dataclass(frozen=True)
class Subspace:
    """The principal subspace of the embeddings of known images."""

    mean: NDArray[np.float32]  # (D,)
    components: NDArray[np.float32]  # (K, D) orthonormal rows

    def distances(self, embeddings: NDArray[np.floating[Any]]) -> Floats:
        """Return (N,) squared distances of embeddings (N, D) from the subspace, 0 or more."""
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
    kept = spread[::-1][:n_components] > _NO_SPREAD  # identical embeddings have no variance in any direction
    return Subspace(mean.astype(np.float32), (directions[kept] / lengths[kept]).astype(np.float32))


def known_images(n: int) -> NDArray[np.int64]:
    """Return the indices of the rows, out of n, that a subspace is fitted to: at most `MAX_IMAGES`, evenly spaced."""
    return np.linspace(0, n - 1, min(n, MAX_IMAGES)).round().astype(np.int64)


def held_out_distances(embeddings: NDArray[np.floating[Any]]) -> Floats:
    """Return (N,) distances of the images, each from a subspace fitted without it (cross-fitting with `N_PARTS` parts)."""
    part = np.arange(len(embeddings)) % N_PARTS
    distances = np.empty(len(embeddings))
    for number in range(N_PARTS):
        distances[part == number] = fit_subspace(embeddings[part != number]).distances(embeddings[part == number])
    return distances


def _unit_length(embeddings: NDArray[np.floating[Any]]) -> Floats:
    values = embeddings.astype(np.float64)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.where(lengths > 0, lengths, 1.0))
