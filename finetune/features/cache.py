"""Cache arrays (rows) on disk under keys; later runs read them through memory maps.

A cache is a folder of spaces. The rows of a space have the same shape and were computed in the same way. Rows are written in
files (shards) with checksums; each is written under a temporary name, flushed and renamed, so a process that is killed leaves no
incomplete shard. Any number of processes may read and write at the same time; a row that two of them compute is stored twice and
read once. A shard also records the seconds that computing its rows took, so that a run that reads them can report their cost. The
size of the cache is limited: the least recently used files are deleted first.
"""

from __future__ import annotations

import json
import mmap
import os
import time
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from finetune.runtime.seconds import Seconds
from finetune.storage.files import write_atomic
from finetune.storage.store import Store, mark_used

KEY_BYTES = 32
SHARD_BYTES = 64 * 1024**2  # of rows that a writer collects in memory before it writes a shard
SHARD_SECONDS = 30.0  # after which it writes a shard in any case, so that a killed process loses no more than that

_MAGIC = b"ftrows02"
_TAIL_BYTES = 4 + 4 + len(_MAGIC)  # checksum and length of the description, then the magic


class DamagedShard(ValueError):
    """The checksum or the size of a shard is wrong."""


@dataclass(frozen=True)
class Shard:
    """The rows of one file, and the seconds that computing them took."""

    rows: NDArray[Any]  # (n, *row_shape), memory-mapped
    mapped: mmap.mmap  # the memory map of `rows`
    seconds: Seconds


@dataclass(frozen=True)
class Rows:
    """The location of the row of each of N keys. Rows are read through memory maps when they are taken."""

    shards: tuple[Shard, ...]
    shard_of: NDArray[np.int32]  # (N,) position in `shards`, -1 if no row is stored
    row_of: NDArray[np.int32]  # (N,) position in the shard
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return len(self.shard_of)

    @property
    def missing(self) -> NDArray[np.int64]:
        """The positions of the keys without a stored row."""
        return np.flatnonzero(self.shard_of < 0)

    @property
    def seconds(self) -> Seconds:
        """The seconds that computing the stored rows took."""
        counts = np.bincount(self.shard_of[self.shard_of >= 0], minlength=len(self.shards))
        parts = (shard.seconds * (int(count) / len(shard.rows)) for shard, count in zip(self.shards, counts, strict=True))
        return sum(parts, Seconds())

    def take(self, positions: NDArray[np.integer]) -> NDArray[Any]:
        """Return a copy of the rows at `positions`, (len(positions), *row_shape).

        Raises:
            KeyError: some of these rows are not stored.
        """
        taken = np.empty((len(positions), *self.row_shape), self.dtype)
        shard_of, row_of = self.shard_of[positions], self.row_of[positions]
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            if shard < 0:
                raise KeyError(f"{len(here)} of {len(positions)} rows are not stored")
            taken[here] = self.shards[shard].rows[row_of[here]]
        return taken

    def release(self) -> None:
        """Free the memory of all pages that were read; they are read from the disk again when they are needed."""
        for shard in self.shards:
            if hasattr(mmap, "MADV_DONTNEED"):
                shard.mapped.madvise(mmap.MADV_DONTNEED)


class RowCache:
    """The part of the cache for rows of one shape and number format."""

    def __init__(self, store: Store, space: str, row_shape: tuple[int, ...], dtype: str) -> None:
        self.folder = store.folder("features") / space
        self.row_shape = row_shape
        self.dtype = np.dtype(dtype)
        self._read: dict[Path, Shard] = {}  # shards whose checksums have been verified

    @property
    def row_bytes(self) -> int:
        """The size of a row with its key, in bytes."""
        return self.dtype.itemsize * int(np.prod(self.row_shape)) + KEY_BYTES

    def find(self, keys: NDArray[np.uint8]) -> Rows:
        """Look up `keys` (N, 32). A shard with a wrong checksum is deleted, and its rows are missing."""
        shard_of, row_of = np.full(len(keys), -1, np.int32), np.zeros(len(keys), np.int32)
        shards: list[Shard] = []
        wanted = _as_strings(keys)
        for path in sorted(self.folder.glob("*.shard")):
            missing = np.flatnonzero(shard_of < 0)
            if not len(missing):
                break
            try:
                stored = _as_strings(_read_keys(path, self.row_shape, self.dtype))
                order = np.argsort(stored)
                at = order[np.minimum(np.searchsorted(stored, wanted[missing], sorter=order), len(stored) - 1)]
                hit = stored[at] == wanted[missing]
                if hit.any():
                    shard = self._open(path)
                    shard_of[missing[hit]], row_of[missing[hit]] = len(shards), at[hit]
                    shards.append(shard)
            except FileNotFoundError:
                continue  # another process deleted it to make room
            except DamagedShard:
                path.unlink(missing_ok=True)
        return Rows(tuple(shards), shard_of, row_of, self.row_shape, self.dtype)

    def writer(self) -> ShardWriter:
        """Return a writer of new rows; call its `flush` at the end to store the last rows."""
        return ShardWriter(self.folder, self.row_shape, self.dtype)

    def _open(self, path: Path) -> Shard:
        """Return a shard. The checksum of its rows is verified the first time."""
        if path not in self._read:
            self._read[path] = _open_shard(path, self.row_shape, self.dtype)
        mark_used(path)
        return self._read[path]


class ShardWriter:
    """Collects rows and writes them as shards.

    Raises:
        DiskFull: by `append` and `flush`; the shards that were written before are intact.
    """

    def __init__(self, folder: Path, row_shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        capacity = max(1, SHARD_BYTES // (dtype.itemsize * int(np.prod(row_shape)) + KEY_BYTES))
        self._folder = folder
        self._keys = np.empty((capacity, KEY_BYTES), np.uint8)
        self._rows = np.empty((capacity, *row_shape), dtype)  # the system allocates its pages as they are written
        self._count = 0
        self._began_at = 0.0
        self._seconds = Seconds()

    def append(self, keys: NDArray[np.uint8], rows: NDArray[Any], seconds: Seconds) -> None:
        """Add rows (n, *row_shape) under their keys (n, 32).

        Args:
            seconds: that computing these rows took.
        """
        of_row = seconds * (1 / max(len(keys), 1))
        if rows.shape != (len(keys), *self._rows.shape[1:]):
            raise ValueError(f"rows of shape {rows.shape} do not fit {len(keys)} keys and row shape {self._rows.shape[1:]}")
        while len(keys):
            if self._count == 0:
                self._began_at = time.monotonic()
            end = min(self._count + len(keys), len(self._keys))
            taken = end - self._count
            self._keys[self._count : end], self._rows[self._count : end] = keys[:taken], rows[:taken]
            self._seconds += of_row * taken
            self._count, keys, rows = end, keys[taken:], rows[taken:]
            if self._count == len(self._keys) or time.monotonic() - self._began_at >= SHARD_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Write the collected rows as a shard."""
        keys, rows, seconds = self._keys[: self._count], self._rows[: self._count], self._seconds
        self._count, self._seconds = 0, Seconds()
        if len(keys):
            shard = self._folder / f"{uuid.uuid4().hex}.shard"
            # Only for this user: they are computed from private images.
            write_atomic(shard, lambda stream: _write_shard(stream, keys, rows, seconds), mode=0o600)


# Format of a shard: the rows, their keys, a JSON description with the checksums of both, and a tail of `_TAIL_BYTES`.


def _write_shard(stream: IO[bytes], keys: NDArray[np.uint8], rows: NDArray[Any], seconds: Seconds) -> None:
    """Write a shard: rows, keys, description and tail."""
    stream.write(rows.data)
    stream.write(keys.data)
    description = {
        "rows": len(keys),
        "shape": list(rows.shape[1:]),
        "dtype": rows.dtype.str,
        "rows_crc32": zlib.crc32(rows.data),
        "keys_crc32": zlib.crc32(keys.data),
        "wall_seconds": seconds.wall,
        "cpu_seconds": seconds.cpu,
    }
    text = json.dumps(description).encode()
    stream.write(text + zlib.crc32(text).to_bytes(4, "little") + len(text).to_bytes(4, "little") + _MAGIC)


def _describe(stream: IO[bytes], path: Path, row_shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[dict[str, Any], int]:
    """Return a shard's description and the size of its rows in bytes.

    Raises:
        DamagedShard: the description is damaged, the file is incomplete, or its rows have another shape or type.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _TAIL_BYTES))
    tail = stream.read(_TAIL_BYTES)
    length = int.from_bytes(tail[4:8], "little")
    if tail[8:] != _MAGIC or length > size - _TAIL_BYTES:
        raise DamagedShard(f"{path}: no description at its end")
    stream.seek(size - _TAIL_BYTES - length)
    text = stream.read(length)
    if zlib.crc32(text) != int.from_bytes(tail[:4], "little"):
        raise DamagedShard(f"{path}: its description differs from its checksum")
    description: dict[str, Any] = json.loads(text)
    rows_bytes = description["rows"] * dtype.itemsize * int(np.prod(row_shape))
    whole = rows_bytes + description["rows"] * KEY_BYTES + length + _TAIL_BYTES
    if description["shape"] != list(row_shape) or description["dtype"] != dtype.str or whole != size:
        raise DamagedShard(f"{path}: not rows of {dtype.str} {row_shape}")
    return description, rows_bytes


def _read_keys(path: Path, row_shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[np.uint8]:
    with open(path, "rb") as stream:
        description, rows_bytes = _describe(stream, path, row_shape, dtype)
        stream.seek(rows_bytes)
        data = stream.read(description["rows"] * KEY_BYTES)
    if zlib.crc32(data) != description["keys_crc32"]:
        raise DamagedShard(f"{path}: keys differ from their checksum")
    return np.frombuffer(data, np.uint8).reshape(-1, KEY_BYTES)


def _open_shard(path: Path, row_shape: tuple[int, ...], dtype: np.dtype[Any]) -> Shard:
    """Open a shard and verify the checksum of its rows.

    Raises:
        DamagedShard: the checksum or the size is wrong.
    """
    with open(path, "rb") as stream:
        description, rows_bytes = _describe(stream, path, row_shape, dtype)
        mapped = mmap.mmap(stream.fileno(), rows_bytes, access=mmap.ACCESS_READ)
        rows = np.frombuffer(mapped, dtype).reshape(-1, *row_shape)
        stream.seek(0)
        checksum = 0
        for start in range(0, rows_bytes, 2**20):
            checksum = zlib.crc32(stream.read(min(2**20, rows_bytes - start)), checksum)
    if checksum != description["rows_crc32"]:
        raise DamagedShard(f"{path}: rows differ from their checksum")
    return Shard(rows, mapped, Seconds(description["wall_seconds"], description["cpu_seconds"]))


def _as_strings(keys: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    """Return keys (N, 32) uint8 as N byte strings, which NumPy can sort and compare; it ignores zeros at their end."""
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").ravel()
