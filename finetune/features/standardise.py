"""Standardise a matrix of features, and convert a linear layer on standardised features into one on raw features. NumPy only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import TrainingError
from finetune.features.lbfgs import Floats

CHUNK_ROWS = 4096
Float32s = NDArray[np.float32]


@dataclass(frozen=True)
class Standardised:
    """The feature matrix, standardised to zero mean and unit variance over its training rows.

    A feature that is constant (up to float32 rounding) becomes zero, and so does its weight.
    """

    rows: Float32s  # (N*K + M, D)
    mean: Floats  # (D,)
    inverse_std: Floats  # (D,), zero for a constant feature

    def fold(self, parameters: Floats) -> tuple[Float32s, Float32s]:
        """Convert parameters (C, D + 1) for standardised rows into weight (C, D) and bias (C,) for raw rows."""
        weight = parameters[:, :-1] * self.inverse_std
        bias = parameters[:, -1] - weight @ self.mean
        return weight.astype(np.float32), bias.astype(np.float32)


def standardise(
    train: NDArray[np.floating[Any]],
    val: NDArray[np.floating[Any]] | None,
    overwrite: Float32s | None,
    weights: Floats | None = None,
) -> Standardised:
    """Standardise the features of training and validation rows; write the result into `overwrite` if it is given.

    Raises:
        TrainingError: some rows are not finite.
    """
    mean, inverse_std = _moments(train) if weights is None else _weighted_moments(train, weights)
    parts = [train] if val is None else [train, val]
    shape = (sum(len(part) for part in parts), train.shape[1])
    rows = np.empty(shape, np.float32) if overwrite is None else overwrite
    if rows.shape != shape:
        raise ValueError(f"an array of shape {rows.shape} does not hold {shape[0]} rows of {shape[1]} features")
    filled = 0
    for part in parts:
        for chunk in _chunks(part):
            rows[filled : filled + len(chunk)] = (chunk - mean) * inverse_std
            filled += len(chunk)
    broken = np.flatnonzero(~np.isfinite(rows.sum(axis=1, dtype=np.float64)))
    if len(broken):
        raise TrainingError(
            f"{len(broken)} of {len(rows)} feature rows are not finite (first: {broken[:5].tolist()}). "
            "Check the weights file, or try compute.precision=float32"
        )
    return Standardised(rows, mean, inverse_std)


def _moments(matrix: NDArray[np.floating[Any]]) -> tuple[Floats, Floats]:
    """Return mean and 1 / standard deviation (D,) of the columns, in two passes: a single pass would suffer from cancellation."""
    n_columns = matrix.shape[1]
    total, squares, largest = np.zeros(n_columns), np.zeros(n_columns), np.zeros(n_columns)
    for chunk in _chunks(matrix):
        total += chunk.sum(axis=0)
        np.maximum(largest, np.abs(chunk).max(axis=0), out=largest)
    mean = total / len(matrix)
    for chunk in _chunks(matrix):
        squares += np.square(chunk - mean).sum(axis=0)
    std = np.sqrt(squares / len(matrix))
    constant = std <= 1e-6 * largest
    return mean, np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, std))


def _weighted_moments(matrix: NDArray[np.floating[Any]], weights: Floats) -> tuple[Floats, Floats]:
    """Return weighted mean and 1 / weighted standard deviation (D,) of the columns, for row weights (N,); see `_moments`."""
    n_columns = matrix.shape[1]
    total, squares, largest = np.zeros(n_columns), np.zeros(n_columns), np.zeros(n_columns)
    starts = range(0, len(matrix), CHUNK_ROWS)
    for start, chunk in zip(starts, _chunks(matrix), strict=True):
        total += weights[start : start + CHUNK_ROWS] @ chunk
        np.maximum(largest, np.abs(chunk).max(axis=0), out=largest)
    mean = total / weights.sum()
    for start, chunk in zip(starts, _chunks(matrix), strict=True):
        squares += weights[start : start + CHUNK_ROWS] @ np.square(chunk - mean)
    std = np.sqrt(squares / weights.sum())
    constant = std <= 1e-6 * largest
    return mean, np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, std))


def _chunks(matrix: NDArray[np.floating[Any]]) -> Iterator[Floats]:
    """Yield the rows as float64, `CHUNK_ROWS` at a time, because a copy of the whole matrix may not fit into memory."""
    for first in range(0, len(matrix), CHUNK_ROWS):
        yield np.asarray(matrix[first : first + CHUNK_ROWS], dtype=np.float64)
