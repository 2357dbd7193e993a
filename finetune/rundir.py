"""The run folder: where one execution of a job writes everything it produces. A file that exists there is complete.

Knows paths, atomic writes and the two append-only journals; does not know what a run means. Torch-free.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from finetune.errors import Conflict, DiskFull


def workspace() -> Path:
    """The workspace folder: ``FINETUNE_HOME``, or ``.finetune`` under the current folder."""
    return Path(os.environ.get("FINETUNE_HOME", ".finetune")).absolute()


def as_model_name(text: str) -> str:
    """A folder's name as a model's name: lower case, anything but letters and digits a dash."""
    kept = "".join(character if character.isascii() and character.isalnum() else "-" for character in text.lower())
    return kept.strip("-")[:63] or "model"


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success flush it to disk and rename it over `target`.

    Raises:
        DiskFull: the disk filled up while writing; `target` is as it was before.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # as the umask allows
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
        _fsync_folder(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"{target}: the disk is full. Free some space and run the same command again; it resumes.") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(target: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write `target` whole or not at all; `write` gets the open binary file."""
    with atomic_path(target) as temporary, open(temporary, "wb") as stream:
        write(stream)


def write_json(target: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN and infinity are refused: they are not JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(target, lambda stream: stream.write(text.encode()))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunBusy(Conflict):
    code, exit_code = "run_busy", os.EX_TEMPFAIL


@dataclass(frozen=True)
class RunDir:
    """Paths inside one run folder, and its two journals (JSON Lines, append-only, each line carries ``at`` in Unix seconds)."""

    root: Path

    @property
    def spec(self) -> Path:
        return self.root / "spec.yaml"

    @property
    def resolved(self) -> Path:
        return self.root / "resolved.json"

    @property
    def split(self) -> Path:
        return self.root / "split.csv"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def tracking(self) -> Path:
        return self.root / "mlflow.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def folds(self) -> Path:
        return self.root / "folds.json"

    @property
    def held_out(self) -> Path:
        return self.root / "held_out.npy"

    def fold(self, number: int) -> RunDir:
        """The run folder of a fold of this run, from 1."""
        return RunDir(self.root / "folds" / str(number))

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def bundle(self) -> Path:
        return self.root / "bundle"

    @property
    def outcome(self) -> Path:
        return self.root / "outcome.json"

    @property
    def progress(self) -> Path:
        return self.root / "progress.json"

    @property
    def error(self) -> Path:
        return self.root / "error.json"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    def create(self) -> RunDir:
        self.root.mkdir(parents=True, exist_ok=True)
        return self

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process out of this run while the block runs; the kernel lets go when this process dies.

        Raises:
            RunBusy: another process is in the run.
        """
        with open(self.create().root / ".lock", "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunBusy(
                    f"{self.root}: another process is working on this run; wait for it, or give another --run-dir"
                ) from None
            for leftover in self.root.rglob(".*.tmp"):  # of writers that were killed
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield

    def event(self, kind: str, message: str, **data: Any) -> None:
        """Append one line to ``events.jsonl``: what happened, for a person (`message`) and for a program (`kind`, `data`)."""
        append_line(self.events, {"at": time.time(), "kind": kind, "message": message, **data})

    def metric(self, step: int, values: Mapping[str, float], *, epoch: float | None = None) -> None:
        """Append one line of metrics (keys are ``split/name``) to ``metrics.jsonl``; `step` counts optimiser steps."""
        append_line(self.metrics, {"at": time.time(), "step": step, "epoch": epoch, "values": dict(values)})


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line with a single write; a line that an earlier process was killed in the middle of is closed first."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, (("\n" if torn else "") + line).encode())
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole JSON lines of a journal; a torn line (its process was killed while writing it) is left out."""
    if not path.exists():
        return []
    records = []
    # Not splitlines(): a message may hold other characters that Python takes for line ends, such as U+2028.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
