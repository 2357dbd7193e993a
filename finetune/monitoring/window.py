"""The window of the newest predictions of one model version, with sums for each of the last hours, in constant memory."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.monitoring.statistics import PredictionStatistics, read_statistics, write_statistics

WINDOW_IMAGES = 1_000
HOURS = 48
HOUR_SECONDS = 3600


@dataclass
class Hour:
    """Sums over the predictions of one hour."""

    at: int  # begin, Unix seconds
    n: int = 0
    confidence_sum: float = 0.0
    n_unlike: int = 0  # images with a larger distance than 95 % of the held-out ones


@dataclass
class Alarm:
    """The state of the alarm, so that drift is reported once and not at every test."""

    since: float | None = None  # begin of the drift, Unix seconds; None: no drift
    last_seen: int = 0  # number of predictions when drift was last found
    looked_at: int = 0  # number of predictions when drift was last tested


class Window:
    """The last `WINDOW_IMAGES` predictions of one model, and sums for the last `HOURS` hours. Not thread-safe.

    Args:
        model_sha256: of the model's file; a stored window of another model with the same name is ignored.
        n_classes: of the model.
        several: whether it gives an image any number of labels, so that those are kept too.
        unlike_beyond: the distance above which an image counts as novel; None: unknown.
    """

    def __init__(self, model_sha256: str, n_classes: int, *, several: bool, unlike_beyond: float | None = None) -> None:
        self.model_sha256 = model_sha256
        self.n_seen = 0  # number of all predictions so far
        self.alarm = Alarm()
        self.hours: dict[int, Hour] = {}
        self._unlike_beyond = unlike_beyond
        self._confidence = np.zeros(WINDOW_IMAGES, np.float32)
        self._label = np.zeros(WINDOW_IMAGES, np.int32)
        self._distance = np.full(WINDOW_IMAGES, np.nan, np.float32)
        self._given = np.zeros((WINDOW_IMAGES, n_classes), bool) if several else None

    def __len__(self) -> int:
        return min(self.n_seen, WINDOW_IMAGES)

    def add(self, statistics: PredictionStatistics, at: float) -> None:
        """Add predictions of the time `at` (Unix seconds); the oldest are overwritten."""
        self._add_to_hour(statistics, at)
        kept = statistics.last(WINDOW_IMAGES)
        places = (self.n_seen + len(statistics) - len(kept) + np.arange(len(kept))) % WINDOW_IMAGES
        self._confidence[places], self._label[places], self._distance[places] = kept.confidence, kept.label, kept.distance
        if self._given is not None and kept.given is not None:
            self._given[places] = kept.given
        self.n_seen += len(statistics)

    def _add_to_hour(self, statistics: PredictionStatistics, at: float) -> None:
        begins = int(at) // HOUR_SECONDS * HOUR_SECONDS
        hour = self.hours.setdefault(begins, Hour(begins))
        hour.n += len(statistics)
        hour.confidence_sum += float(statistics.confidence.sum(dtype=np.float64))
        if self._unlike_beyond is not None:
            hour.n_unlike += int((statistics.distance > self._unlike_beyond).sum())
        for old in sorted(self.hours)[:-HOURS]:
            del self.hours[old]

    @property
    def knows_unlike(self) -> bool:
        """Whether hours count novel images."""
        return self._unlike_beyond is not None

    def statistics(self) -> PredictionStatistics:
        """Return a copy of the statistics in the window, oldest first."""
        order = self._order()
        given = None if self._given is None else self._given[order]
        return PredictionStatistics(self._confidence[order], self._label[order], self._distance[order], given)

    def _order(self) -> NDArray[np.int64]:
        return (self.n_seen - len(self) + np.arange(len(self))) % WINDOW_IMAGES

    def write(self, path: Path) -> None:
        """Write the window as one file, atomically."""
        header: dict[str, Any] = {
            "schema_version": 1,
            "model_sha256": self.model_sha256,
            "n_seen": self.n_seen,
            "alarm": asdict(self.alarm),
            "hours": [asdict(hour) for hour in self.hours.values()],
        }
        write_statistics(path, self.statistics(), header=np.frombuffer(json.dumps(header).encode(), np.uint8))

    def read(self, path: Path) -> None:
        """Load a window that `write` wrote; do nothing if the file is missing, damaged, or of another model."""
        try:
            statistics, arrays = read_statistics(path.read_bytes())
            header = json.loads(arrays["header"].tobytes())
            hours = [Hour(**hour) for hour in header["hours"]]
            alarm, n_seen, sha256 = Alarm(**header["alarm"]), int(header["n_seen"]), header["model_sha256"]
        except (FileNotFoundError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return
        fits = (statistics.given is None) == (self._given is None) and len(statistics) == min(n_seen, WINDOW_IMAGES)
        if sha256 != self.model_sha256 or not fits:
            return
        if statistics.given is not None and self._given is not None and statistics.given.shape[1] != self._given.shape[1]:
            return
        self.n_seen = n_seen - len(statistics)
        self.add(statistics, 0.0)
        self.hours, self.alarm = {hour.at: hour for hour in hours}, alarm
