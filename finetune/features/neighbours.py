"""The training image that is most like each held-out image, by its frozen features: what a leak between splits looks like.

A copy of a training image (saved again, scaled, cropped) is far closer to its original than to any other image, so what tells is
the ratio of two distances, to the nearest and to the fifth nearest (Lowe 2004 uses the second; a copy may have two originals).
NumPy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

COMPARED_WITH = 5  # the rank of the neighbour whose distance is the yardstick
CHUNK_ROWS = 512
_SMALLEST = 1e-6  # of a standard deviation, per feature


@dataclass(frozen=True)
class Neighbours:
    """For each of M images: the position of the nearest training image, and how much nearer it is than the fifth nearest."""

    nearest: NDArray[np.int64]  # (M,)
    ratio: NDArray[np.float64]  # (M,) 0: the same features; near 1: no nearer than others


def nearest_training_images(train: NDArray[np.floating[Any]], held_out: NDArray[np.floating[Any]]) -> Neighbours | None:
    """Find the nearest of N training rows (N, D) for each of M rows (M, D); None where there are too few training rows."""
    if len(train) <= COMPARED_WITH or not len(held_out):
        return None
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
