"""Sampled inputs: images of prediction requests that are stored for later labelling. Off by default.

Each image is stored as it was sent, as ``<milliseconds>-<sha256>.jpg``, with a ``.json`` record of the caller, the time and the
prediction, in ``sampled-inputs/`` of a version's monitoring folder. Samples are deleted after a maximal age, and the oldest first
if all samples of all models exceed a number of bytes.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.bundle.calibration import NOVEL
from finetune.bundle.image_formats import sniff
from finetune.bundle.registry import ModelVersion, Registry
from finetune.errors import InvalidInput, UnsupportedImage
from finetune.messages import printable
from finetune.storage.files import TEMPORARY_SUFFIX, atomic_path, json_text, write_atomic

FOLDER = "sampled-inputs"
_ENDINGS = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "HEIF": "heic",
    "AVIF": "avif",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
}
_RECORD = ".json"


@dataclass(frozen=True)
class SamplingPolicy:
    """How many images are stored, and for how long.

    Args:
        fraction: share of the images of prediction requests; 0 stores none.
        max_bytes: of all samples of all models, including records.
        max_age_seconds: age at which a sample is deleted.
    """

    fraction: float = 0.0
    max_bytes: int = 1 << 30
    max_age_seconds: float = 30 * 86400.0


@dataclass(frozen=True)
class Sample:
    """One stored image with its record."""

    path: Path
    record: Mapping[str, Any]

    @property
    def uncertainty(self) -> tuple[bool, float]:
        """A sort key that puts novel images first, then those with the least confident predictions."""
        novelty = self.record.get("novelty")
        return (not (isinstance(novelty, float) and novelty >= NOVEL), float(self.record.get("confidence", 1.0)))


@dataclass(frozen=True, slots=True)
class _Kept:
    """The files of one sample. A server may hold thousands, so the path is text."""

    at: float
    place: str
    size_bytes: int

    @property
    def path(self) -> Path:
        return Path(self.place)


class SampleStore:
    """The samples of a registry, limited by a policy. Not thread-safe.

    Deletions by other processes are only noticed by `enforce`.
    """

    def __init__(self, registry: Registry, policy: SamplingPolicy) -> None:
        self._registry = registry
        self._policy = policy
        self._kept: deque[_Kept] = deque()  # oldest first
        self._bytes = 0

    @property
    def size_bytes(self) -> int:
        """The disk space of the samples, as last counted."""
        return self._bytes

    def enforce(self, now: float) -> None:
        """List the samples on disk, and delete those that exceed the policy."""
        found = sorted(_files(self._registry, sweep=True), key=lambda one: one.at)
        self._kept, self._bytes = deque(found), sum(one.size_bytes for one in found)
        self._make_room(0, now)

    def keep(self, name: str, version: str, data: bytes, record: Mapping[str, Any], at: float) -> bool:
        """Store one image with its record; return False if its version was deleted or the image exceeds `max_bytes` by itself.

        Args:
            at: time of the request, Unix seconds.
        """
        digest = hashlib.sha256(data).hexdigest()
        said = json_text({"at": _text_of(at), "model": name, "version": version, "sha256": digest, **record}, indent=1).encode()
        size = len(data) + len(said)
        if size > self._policy.max_bytes:
            return False
        self._make_room(size, at)
        with self._registry.monitoring(name, version) as folder:
            if folder is None:
                return False
            samples = folder / FOLDER
            samples.mkdir(mode=0o700, exist_ok=True)
            path = samples / f"{int(at * 1000):014d}-{digest[:16]}.{_ending(data)}"
            if path.exists():
                return False
            write_atomic(path.with_suffix(_RECORD), lambda stream: stream.write(said))  # first: no image without a record
            write_atomic(path, lambda stream: stream.write(data))
        self._kept.append(_Kept(at, str(path), size))
        self._bytes += size
        return True

    def _make_room(self, size: int, now: float) -> None:
        while self._kept:
            oldest = self._kept[0]
            if oldest.at >= now - self._policy.max_age_seconds and self._bytes + size <= self._policy.max_bytes:
                return
            _delete(oldest.path)
            self._kept.popleft()
            self._bytes -= oldest.size_bytes


def folder_of(registry: Registry, version: ModelVersion) -> Path:
    """Return the folder of a version's samples, which may not exist yet."""
    return registry.monitoring_of(version.name, version.version) / FOLDER


def samples_of(registry: Registry, version: ModelVersion) -> list[Sample]:
    """Return the readable samples of a version, oldest first."""
    found = []
    for kept in sorted(_files_in(folder_of(registry, version)), key=lambda one: one.path.name):
        with contextlib.suppress(FileNotFoundError, ValueError):  # deleted meanwhile
            if kept.path.suffix == _RECORD:  # its image is being written
                continue
            record = json.loads(kept.path.with_suffix(_RECORD).read_bytes())
            if isinstance(record, dict):
                found.append(Sample(kept.path, record))
    return found


def copy_samples(samples: Sequence[Sample], out: Path) -> list[dict[str, Any]]:
    """Copy samples into a new folder with a file ``samples.jsonl``, most useful for labelling first; return its lines.

    Raises:
        InvalidInput: the folder is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise InvalidInput(f"{printable(out)} is not empty; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, sample in enumerate(sorted(samples, key=lambda one: one.uncertainty), start=1):
        name = f"{number:05d}-{sample.path.name}"
        with contextlib.suppress(FileNotFoundError), atomic_path(out / name) as temporary:  # deleted meanwhile
            shutil.copyfile(sample.path, temporary)
            lines.append({"file": name, **sample.record})
    text = "".join(json_text(line) + "\n" for line in lines)
    write_atomic(out / "samples.jsonl", lambda stream: stream.write(text.encode()))
    return lines


def delete_samples(samples: Sequence[Sample]) -> None:
    """Delete samples with their records."""
    for sample in samples:
        _delete(sample.path)


def _files(registry: Registry, *, sweep: bool = False) -> Iterator[_Kept]:
    for name in registry.names():
        for version in registry.versions(name):
            yield from _files_in(folder_of(registry, version), sweep=sweep)


def _files_in(folder: Path, *, sweep: bool = False) -> Iterator[_Kept]:
    """Yield the samples in a folder, including records without an image, which a killed process left behind.

    Args:
        sweep: also delete unfinished files; no other process may be writing samples then.
    """
    sizes: dict[str, int] = {}
    paths: dict[str, Path] = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            stem, dot, ending = entry.name.rpartition(".")
            if sweep and entry.name.endswith(TEMPORARY_SUFFIX):
                Path(entry.path).unlink(missing_ok=True)
            if not dot or not stem.partition("-")[0].isdecimal():
                continue
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                sizes[stem] = sizes.get(stem, 0) + entry.stat().st_size
                if f".{ending}" != _RECORD or stem not in paths:
                    paths[stem] = Path(entry.path)
    for stem, path in paths.items():
        yield _Kept(int(stem.partition("-")[0]) / 1000, str(path), sizes[stem])


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(_RECORD).unlink(missing_ok=True)


def _ending(data: bytes) -> str:
    try:
        return _ENDINGS[sniff(data)]
    except UnsupportedImage:
        return "jpg"  # an image after other bytes; the suffix is for people only


def _text_of(at: float) -> str:
    text = datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
