"""Checkpoints: everything that a run needs to go on, in one file that is whole or is not there.

``step-00000576.pt`` is written under a temporary name, flushed, renamed, and only then gets its ``.sha256`` beside it; a file
whose checksum is missing or differs is damaged and passed over. Files load with ``weights_only=True``: no code runs from them.
Knows nothing of what the state means.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from finetune.errors import CheckpointError
from finetune.storage.files import atomic_path, sha256_file, write_atomic

KEEP = 2

DamageReport = Callable[[Path, str], None]


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `KEEP`.

    Raises:
        DiskFull: the disk filled up while writing; earlier checkpoints are as they were.
    """
    path = folder / f"step-{step:08d}.pt"
    with atomic_path(path) as temporary:
        digest = _write(temporary, state)
    write_atomic(_sidecar(path), lambda stream: stream.write(digest.encode()))
    for old in _newest_first(folder)[KEEP:]:
        _sidecar(old).unlink(missing_ok=True)  # first, so that what is left of a removal that was cut short counts as damaged
        old.unlink()
    return path


def load_newest(folder: Path, on_damaged: DamageReport, map_location: str = "cpu") -> dict[str, Any] | None:
    """Return the state of the newest whole checkpoint, None where there is none; damaged ones are reported and left out."""
    for path in _newest_first(folder):
        if damage := _damage(path):
            on_damaged(path, damage)
            continue
        state: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return state
    return None


def check_belongs(found: Mapping[str, str], expected: Mapping[str, str], folder: Path) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        CheckpointError: names what differs (the spec, the dataset, the backbone's weights …).
    """
    differs = [key for key, value in expected.items() if found.get(key) != value]
    if differs:
        raise CheckpointError(
            f"{folder}: these checkpoints belong to another run: {' and '.join(differs)} changed since they were written. "
            "Give another run folder, or delete the checkpoints to begin anew."
        )


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _damage(path: Path) -> str | None:
    sidecar = _sidecar(path)
    if not sidecar.exists():
        return "it was not finished: its checksum is missing"
    if sidecar.read_text().strip() != sha256_file(path):
        return "its bytes do not match its checksum"
    return None


def _write(path: Path, state: Mapping[str, Any]) -> str:
    """Write `state` and return the sha256 of the bytes that are meant to be there."""
    with open(path, "wb") as stream:
        writer = _HashingWriter(stream)
        try:
            torch.save(dict(state), cast(IO[bytes], writer))
        except RuntimeError as error:  # torch's zip writer replaces the error of the stream under it by one of its own
            raise writer.failure or error from error
    return writer.sha256.hexdigest()


class _HashingWriter:
    """Hashes what passes to `stream`, and remembers why writing failed."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.sha256 = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            written = self.stream.write(data)
        except OSError as error:
            self.failure = error
            raise
        self.sha256.update(data)
        return written

    def flush(self) -> None:
        self.stream.flush()
