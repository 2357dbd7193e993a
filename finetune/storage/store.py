"""The cache of data that can be recomputed: features, decoded pixels, exported prefixes, unpacked data, in one byte budget.

Each kind of content has a namespace, which is a folder inside the store. When space is needed, the least recently used files of
all namespaces are deleted, but never files that were used since this `Store` was opened, so that a run does not delete its own
input. Notes, such as which files decode, are small and not counted in the budget. Any number of processes may share one folder.
"""

from __future__ import annotations

import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from finetune.storage.files import TEMPORARY_SUFFIX, files_under

Namespace = Literal["features", "pixels", "engines", "sources", "notes"]
BUDGETED: tuple[Namespace, ...] = ("features", "pixels", "engines", "sources")

LARGEST_BUDGET_BYTES = 20 * 1024**3
_CLOCK_STEP_SECONDS = 0.1  # the file system's clock for timestamps may lag by this much
ABANDONED_SECONDS = 3600.0  # a temporary file of this age was left by a process that died


@dataclass(frozen=True, order=True)
class _Entry:
    used_at: float  # Unix seconds
    path: Path
    n_bytes: int


class Store:
    """The cache folder of a workspace. Safe between threads; other processes may read, write and delete at the same time."""

    def __init__(self, root: Path, budget_bytes: int | None = None, *, at_most_bytes: int = LARGEST_BUDGET_BYTES) -> None:
        """Open the store in `root`.

        Args:
            budget_bytes: largest total size of the budgeted namespaces; by default half of the sum of their present size and the
                free disk space, but not more than `at_most_bytes`.
        """
        self.root = root
        self.opened_at = time.time() - _CLOCK_STEP_SECONDS
        self._lock = threading.Lock()
        self._given_budget, self._at_most_bytes = budget_bytes, at_most_bytes
        self._room_bytes: int | None = None  # counted at the first call of `reserve`
        self._deletable: list[_Entry] = []  # the least recently used one last

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the same folder."""
        return partial(Store, at_most_bytes=self._at_most_bytes), (self.root, self._given_budget)

    def folder(self, namespace: Namespace) -> Path:
        """Return the folder of a namespace, which may not exist yet."""
        return self.root / namespace

    @property
    def budget_bytes(self) -> int:
        """The largest total size of the budgeted namespaces."""
        if self._given_budget is not None:
            return self._given_budget
        self.root.mkdir(parents=True, exist_ok=True)
        used = sum(entry.n_bytes for entry in self._entries())
        return min(self._at_most_bytes, (shutil.disk_usage(self.root).free + used) // 2)

    def reserve(self, n_bytes: int) -> bool:
        """Reserve `n_bytes` of the budget; return False if they do not fit.

        To make room, files that were not used since this store was opened are deleted, least recently used first.
        """
        with self._lock:
            if self._room_bytes is None:
                self._count_files()
            assert self._room_bytes is not None
            if self._room_bytes + sum(entry.n_bytes for entry in self._deletable) < n_bytes:
                return False
            while self._room_bytes < n_bytes and self._deletable:
                entry = self._deletable.pop()
                if _used_at(entry.path) < self.opened_at:
                    entry.path.unlink(missing_ok=True)
                    self._room_bytes += entry.n_bytes
            if self._room_bytes < n_bytes:
                return False
            self._room_bytes -= n_bytes
            return True

    def forget_room(self) -> None:
        """Discard the count of free bytes, so that `reserve` counts again. Call it when a write found the disk full."""
        with self._lock:
            self._room_bytes = None

    def _count_files(self) -> None:
        entries = sorted(self._entries(), reverse=True)
        self._deletable = [entry for entry in entries if entry.used_at < self.opened_at]
        budget = self.budget_bytes
        self._room_bytes = max(0, budget - sum(entry.n_bytes for entry in entries))

    def _entries(self) -> Iterator[_Entry]:
        """Yield every file of the budgeted namespaces; delete temporary files of dead processes."""
        for namespace in BUDGETED:
            for path in files_under(self.folder(namespace)):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue  # another process deleted it
                if not stat.S_ISREG(status.st_mode):
                    continue
                if path.suffix == TEMPORARY_SUFFIX and time.time() - status.st_mtime > ABANDONED_SECONDS:
                    path.unlink(missing_ok=True)
                    continue
                yield _Entry(status.st_mtime, path, status.st_size)


def mark_used(path: Path) -> None:
    """Set the time of last use of a file in a store to now."""
    now = time.time()
    os.utime(path, (now, now))


def _used_at(path: Path) -> float:
    """Return the time of last use of a file; infinity if another process has just deleted it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
