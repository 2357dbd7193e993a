"""Write and read checkpoints: everything that a run needs to resume, in one file.

A checkpoint such as ``step-00000576.pt`` is written under a temporary name, flushed and renamed; its checksum is written beside
it afterwards, with the suffix ``.sha256``. A file whose checksum is missing or differs is damaged and is skipped. Files are
loaded with ``weights_only=True``, so no code from them is executed. The content of the state is the caller's.
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
    """Write the checkpoint of `step`, delete all but the newest `KEEP`, and return its path.

    Raises:
        DiskFull: there is no space left; the earlier checkpoints are unchanged.
    """
    path = folder / f"step-{step:08d}.pt"
    with atomic_path(path) as temporary:
        digest = _write(temporary, state)
    write_atomic(_sidecar(path), lambda stream: stream.write(digest.encode()))
    for old in _newest_first(folder)[KEEP:]:
        _sidecar(old).unlink(missing_ok=True)  # first: if the deletion is interrupted, the checkpoint counts as damaged
        old.unlink()
    return path


def load_newest(folder: Path, on_damaged: DamageReport, map_location: str = "cpu") -> dict[str, Any] | None:
    """Return the state in the newest intact checkpoint; None if there is none. Damaged ones are skipped and reported."""
    for path in _newest_first(folder):
        if damage := _damage(path):
            on_damaged(path, damage)
            continue
        state: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return state
    return None


def check_belongs(found: Mapping[str, str], expected: Mapping[str, str], folder: Path) -> None:
    """Check that a checkpoint belongs to this run.

    Args:
        found, expected: digests of the spec, the dataset and whatever else identifies a run, by name.

    Raises:
        CheckpointError: some digests differ; the message names them.
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
    """Write `state` and return the sha256 of the bytes that were passed to the file."""
    with open(path, "wb") as stream:
        writer = _HashingWriter(stream)
        try:
            torch.save(dict(state), cast(IO[bytes], writer))
        except RuntimeError as error:  # torch's zip writer replaces the stream's error by one of its own
            raise writer.failure or error from error
    return writer.sha256.hexdigest()


class _HashingWriter:
    """A stream that hashes the bytes it passes on to `stream`, and keeps the error if writing them fails."""

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
