"""What MLflow should hold about a run besides its metrics and files; kept in ``mlflow.json`` in the run folder."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from finetune.errors import DiskFull
from finetune.storage.files import read_json, write_json
from finetune.storage.rundir import RunDir

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

_MAX_VALUE_CHARACTERS = 6000
_MAX_KEY_CHARACTERS = 250


@dataclass(frozen=True)
class RunRecord:
    """What MLflow should hold about a run besides files and metrics, and how far that got; ``mlflow.json`` in the run folder."""

    experiment: str
    name: str
    started_at: float
    key: str  # finds the run in MLflow if this process dies between creating it there and noting its id here
    run_id: str | None = None
    tracking_uri: str = ""  # for people; without credentials
    parent_run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[Mapping[str, str]] = ()
    model: Mapping[str, Any] | None = None  # name, aliases, tags
    model_version: str | None = None
    status: str = "RUNNING"
    ended_at: float | None = None
    attempts: int = 0
    sent: Mapping[str, str] = field(default_factory=dict)  # path in the run folder -> sha256 of what was sent
    complete: bool = False


def read_record(run: RunDir) -> RunRecord | None:
    """The record of a run, None if it was never tracked."""
    path = run.tracking
    if not path.exists():
        return None
    known = {field.name for field in fields(RunRecord)}  # another version of finetune may have written more
    return RunRecord(**{key: value for key, value in read_json(path).items() if key in known})


class State:
    """The record, shared by the caller's thread and the sending one, and kept on disk."""

    def __init__(self, run: RunDir, record: RunRecord) -> None:
        self._path, self._lock, self._record = run.tracking, threading.Lock(), record

    @property
    def record(self) -> RunRecord:
        return self._record

    def change(self, **changes: Any) -> RunRecord:
        with self._lock:
            self._record = replace(self._record, **changes)
            # A full disk is the run's own trouble, which it meets at its next checkpoint; it is not raised from here.
            with contextlib.suppress(OSError, DiskFull):
                write_json(self._path, asdict(self._record))
            return self._record


def key_text(name: str) -> str:
    """A name that MLflow takes: its characters, no empty or dotted path part, at most 250 long."""
    parts = (part for part in re.sub(r"[^\w.\-: /]", "_", name).split("/") if part.strip(". "))
    return "/".join(parts)[:_MAX_KEY_CHARACTERS] or "_"


def value_text(value: object, limit: int = _MAX_VALUE_CHARACTERS) -> str:
    """A value as a param holds it; what is too long is cut, the same way each time, and says so."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) <= limit:
        return text
    note = f"… ({len(text)} characters)"
    return text[: limit - len(note)] + note
