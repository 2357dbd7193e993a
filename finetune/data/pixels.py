"""Decoded large photographs on disk, so that only the first epoch decodes them.

Decoding a 12-megapixel JPEG takes about 40 ms of a core, reading its decoded pixels back 1 ms; photographs of web size decode
in little more than reading takes, so they are not stored (`LARGE_PX`). A stored picture is found by the sha256 of the image
file and by how it was decoded. Each is one file, written whole or not at all, so any number of runs may share a folder and be
killed at any moment. The folder is bounded; what does not fit is decoded again. Torch-free.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL

from finetune.bundle.image import decode_image, naming, read_bytes
from finetune.data.index import Sample
from finetune.errors import DiskFull, ImageError
from finetune.rundir import write_atomic

LARGE_PX = 2_000_000  # pixels of the encoded image from which storing pays
LARGEST_BUDGET_BYTES = 8 * 1024**3


class PixelStore:
    """``read(sample, short_side_px)`` is `read_image`, remembered. Threads and processes may share it."""

    def __init__(self, folder: Path, budget_bytes: int | None = None) -> None:
        self.folder = folder
        self.opened_at = time.time()
        self._lock = threading.Lock()
        self._budget_bytes = budget_bytes
        self._room_bytes: int | None = None  # counted when the first picture is stored
        self._unused: list[tuple[int, Path]] = []

    def read(self, sample: Sample, short_side_px: int) -> np.ndarray:
        """(H, W, 3) uint8, upright; the same pixels whether they were stored or not.

        Raises:
            ImageError: the file does not decode, and no pixels of it are stored; it is named.
        """
        path = self._path(sample, short_side_px)
        if path is not None and (stored := _load(path)) is not None:
            return stored
        try:
            data = read_bytes(sample.path)
            rgb = decode_image(data, short_side_px=short_side_px)
        except ImageError as error:
            raise naming(sample.path, error) from None
        unchanged = path is not None and hashlib.sha256(data).hexdigest() == sample.sha256  # since it was checked
        if path is not None and unchanged:
            self._store(path, rgb)
        return rgb

    def _path(self, sample: Sample, short_side_px: int) -> Path | None:
        """Where the sample's pixels are stored, if they are worth it."""
        if not sample.sha256 or sample.size_px is None or sample.size_px[0] * sample.size_px[1] < LARGE_PX:
            return None
        return self.folder / f"pillow-{PIL.__version__}-short-side-{short_side_px}" / sample.sha256[:2] / f"{sample.sha256}.npy"

    def _store(self, path: Path, rgb: np.ndarray) -> None:
        if not self._take_room(rgb.nbytes):
            return
        try:
            write_atomic(path, lambda stream: np.save(stream, rgb, allow_pickle=False))
        except DiskFull:  # others need the disk more; pictures are decoded as if there were no store
            with self._lock:
                self._room_bytes, self._unused = 0, []

    def _take_room(self, needed: int) -> bool:
        """Count `needed` bytes against the budget, in place of pictures that no run has read since this store was opened."""
        with self._lock:
            if self._room_bytes is None:
                self._unused, self._room_bytes = self._take_stock()
            while self._room_bytes < needed and self._unused:
                size, path = self._unused.pop()
                if _used_at(path) < self.opened_at:
                    path.unlink(missing_ok=True)
                    self._room_bytes += size
            if self._room_bytes < needed:
                return False
            self._room_bytes -= needed
            return True

    def _take_stock(self) -> tuple[list[tuple[int, Path]], int]:
        """Every stored (bytes, path), last the one that has been unused for longest; and the bytes that the budget leaves."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = sorted(_stored(self.folder), reverse=True)
        used = sum(size for _, size, _ in stored)
        budget = self._budget_bytes
        if budget is None:
            budget = min(LARGEST_BUDGET_BYTES, (shutil.disk_usage(self.folder).free + used) // 4)
        return [(size, path) for _, size, path in stored], max(0, budget - used)


def _load(path: Path) -> np.ndarray | None:
    """The stored pixels, marked as read now; None where there are none, or none that can be read."""
    try:
        rgb: np.ndarray = np.load(path, allow_pickle=False)
        os.utime(path)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError):  # not what was written: the disk lost it
        path.unlink(missing_ok=True)
        return None
    return rgb


def _stored(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """(last used, bytes, path) of every file, those included that a killed process left half written."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another run made room
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                yield status.st_mtime, status.st_size, path


def _used_at(path: Path) -> float:
    """When a file was last read by a store; now, if another run has just deleted it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()
