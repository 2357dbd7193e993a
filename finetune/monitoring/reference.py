"""The reference of drift monitoring: statistics of predictions for held-out images, in the bundle as ``drift.npz``."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.errors import BundleError
from finetune.monitoring.statistics import PredictionStatistics, read_statistics, write_statistics

MIN_IMAGES = 20  # with fewer the tests have no power
MAX_IMAGES = 10_000  # more hardly increase the power


@dataclass(frozen=True)
class Reference:
    """The statistics of a model's predictions for held-out images."""

    split: str  # test, or val if there is no test split, or cv; accepted: live images that an operator has accepted
    statistics: PredictionStatistics

    def __len__(self) -> int:
        return len(self.statistics)

    @property
    def distances(self) -> NDArray[np.float32] | None:
        """The finite distances of the held-out images' embeddings; None if there are none."""
        known = self.statistics.distance[np.isfinite(self.statistics.distance)]
        return known if len(known) else None

    def without_distances(self) -> Reference:
        """Return the reference without distances, for a model whose embeddings differ from those in the table."""
        return replace(self, statistics=replace(self.statistics, distance=np.full(len(self), np.nan, np.float32)))


def write_reference(path: Path, reference: Reference) -> None:
    """Write a reference file."""
    header = np.frombuffer(json.dumps({"schema_version": 1, "split": reference.split}).encode(), np.uint8)
    write_statistics(path, reference.statistics, header=header)


def read_reference(path: Path) -> Reference | None:
    """Return the reference in a file; None if there is no such file, as in bundles of earlier versions.

    Raises:
        BundleError: the file is damaged.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        statistics, arrays = read_statistics(data)
        header = json.loads(arrays["header"].tobytes())
        return Reference(str(header["split"]), statistics)
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path.parent}: {path.name} cannot be read: {error}. Delete it, or export the bundle again") from None
