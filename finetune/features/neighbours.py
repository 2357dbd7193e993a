"""Find the nearest training image of each held-out image in the space of frozen features, to detect leaks between splits.

A copy of a training image (saved again, scaled, cropped) is much closer to its original than to any other image. So the ratio of
the distances to the nearest and to the fifth nearest training image is small for copies. (Lowe 2004 uses the second nearest; here
a copy may have several originals.) Uses NumPy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.runtime.blas import blas_threads_for

COMPARED_WITH = 5  # the rank of the neighbour whose distance the nearest one's is divided by
CHUNK_ROWS = 512
_SMALLEST = 1e-6  # of a standard deviation, per feature


@dataclass(frozen=True)
class Neighbours:
    """The nearest training image of each of M held-out images."""

    nearest: NDArray[np.int64]  # (M,) its position among the training images
    ratio: NDArray[np.float64]  # (M,) its distance divided by that of the fifth nearest; 0: the features are equal


def nearest_training_images(train: NDArray[np.floating[Any]], held_out: NDArray[np.floating[Any]]) -> Neighbours | None:
    """Find the nearest training row (N, D) for each held-out row (M, D); return None if there are too few training rows."""
    if len(train) <= COMPARED_WITH or not len(held_out):
        return None
    with blas_threads_for(train.size):
        return _nearest(train, held_out)


def _nearest(train: NDArray[np.floating[Any]], held_out: NDArray[np.floating[Any]]) -> Neighbours:
    mean, spread = train.mean(axis=0), train.std(axis=0)
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > _SMALLEST * np.abs(mean).max(initial=1.0))
    rows, questions = ((part - mean) * scale for part in (train, held_out))
    squares = np.einsum("nd,nd->n", rows, rows)
    nearest, ratios = [], []
    for start in range(0, len(questions), CHUNK_ROWS):
        chunk = questions[start : start + CHUNK_ROWS]
        distances = squares - 2 * (chunk @ rows.T) + np.einsum("nd,nd->n", chunk, chunk)[:, None]  # (m, N), squared
        closest = np.argpartition(distances, COMPARED_WITH - 1, axis=1)[:, :COMPARED_WITH]
        of_closest = np.maximum(np.take_along_axis(distances, closest, axis=1), 0.0)
        nearest.append(np.take_along_axis(closest, of_closest.argmin(axis=1)[:, None], axis=1)[:, 0])
        yardstick = of_closest.max(axis=1)
        ratios.append(np.sqrt(np.divide(of_closest.min(axis=1), yardstick, out=np.ones(len(chunk)), where=yardstick > 0)))
    return Neighbours(np.concatenate(nearest), np.concatenate(ratios).astype(np.float64))
