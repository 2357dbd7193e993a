"""The statistics of predictions that drift monitoring stores: a few numbers per image, never the image.

They are computed for held-out images when a model is exported (`reference`), and for images in production (`window`).
Torch-free.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.metrics.novelty import Subspace
from finetune.storage.files import write_atomic
from finetune.tasks import task_named


@dataclass(frozen=True)
class PredictionStatistics:
    """The statistics of N predictions."""

    confidence: NDArray[np.float32]  # (N,) probability of the most probable class
    label: NDArray[np.int32]  # (N,) index of the most probable class
    distance: NDArray[np.float32]  # (N,) of the embedding from the known subspace (`finetune.metrics.novelty`); NaN: unknown
    given: NDArray[np.bool_] | None = None  # (N, C) labels that are given by thresholds; None if the task has none

    def __len__(self) -> int:
        return len(self.confidence)

    def last(self, n: int) -> PredictionStatistics:
        """Return the statistics of the newest `n` predictions."""
        return self._between(slice(max(0, len(self) - n), None))

    def row(self, number: int) -> PredictionStatistics:
        """Return the statistics of one prediction."""
        return self._between(slice(number, number + 1))

    def _between(self, kept: slice) -> PredictionStatistics:
        given = None if self.given is None else self.given[kept]
        return PredictionStatistics(self.confidence[kept], self.label[kept], self.distance[kept], given)


def statistics_of(
    task: str,
    probs: NDArray[np.floating[Any]],
    embeddings: NDArray[np.floating[Any]] | None,
    subspace: Subspace | None,
    thresholds: Sequence[float] | None = None,
) -> PredictionStatistics:
    """Compute the statistics of N predictions.

    Args:
        probs, embeddings: (N, C) and (N, D).
        subspace: of the embeddings of known images; None if the bundle has none.
        thresholds: (C,) least probabilities with which labels are given; by default those of the task, if it has any.
    """
    known = subspace is not None and embeddings is not None
    distance = subspace.distances(embeddings) if known else np.full(len(probs), np.nan)  # type: ignore[union-attr, arg-type]
    limits = task_named(task).default_thresholds(probs.shape[1]) if thresholds is None else thresholds
    given = None if limits is None else probs >= np.asarray(limits)
    return PredictionStatistics(
        probs.max(axis=1).astype(np.float32), probs.argmax(axis=1).astype(np.int32), distance.astype(np.float32), given
    )


def concatenated(parts: Sequence[PredictionStatistics]) -> PredictionStatistics:
    """Concatenate statistics of one model, at least one, in the order given."""
    given = [part.given for part in parts if part.given is not None]
    return PredictionStatistics(
        np.concatenate([part.confidence for part in parts]),
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.distance for part in parts]),
        np.concatenate(given) if given else None,
    )


def write_statistics(path: Path, statistics: PredictionStatistics, **more: NDArray[Any]) -> None:
    """Write statistics and `more` arrays as one ``.npz`` file without pickle, atomically."""
    arrays: dict[str, Any] = {
        "confidence": statistics.confidence, "label": statistics.label, "distance": statistics.distance, **more,
    }  # fmt: skip
    if statistics.given is not None:
        arrays |= {"given": np.packbits(statistics.given, axis=1), "n_classes": np.array(statistics.given.shape[1])}
    write_atomic(path, lambda stream: np.savez(stream, allow_pickle=False, **arrays))


def read_statistics(data: bytes) -> tuple[PredictionStatistics, dict[str, NDArray[Any]]]:
    """Parse the contents of a file that `write_statistics` wrote; return the statistics and all arrays.

    Raises:
        ValueError, KeyError, EOFError, zipfile.BadZipFile: the contents are invalid.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as loaded:
        arrays = {name: loaded[name] for name in loaded.files}
    given = None
    if "given" in arrays:
        given = np.unpackbits(arrays.pop("given"), axis=1, count=int(arrays.pop("n_classes"))).astype(bool)
    found = PredictionStatistics(arrays.pop("confidence"), arrays.pop("label"), arrays.pop("distance"), given)
    if not len(found.confidence) == len(found.label) == len(found.distance) == (len(found) if given is None else len(given)):
        raise ValueError("its columns have different lengths")
    return found, arrays
