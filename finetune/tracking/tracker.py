"""What the pipeline talks to: it says what MLflow should know, and a thread of its own sees that MLflow gets it."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from finetune.storage.rundir import RunDir
from finetune.tracking.link import Link
from finetune.tracking.record import RunRecord, State, Status, key_text, read_record, value_text
from finetune.tracking.server import destination, without_credentials

_FLUSH_SECONDS = 2.0
_END_SECONDS = {"RUNNING": 30.0, "FINISHED": 30.0, "FAILED": 15.0, "KILLED": 5.0}  # who is being killed has little time
_RETRY_SECONDS = 60.0  # the longest pause between two attempts while MLflow does not answer
_MAX_DIGEST_CHARACTERS = 36


@dataclass(frozen=True)
class Delivery:
    """Whether MLflow has everything of a run; `reason` says why not."""

    complete: bool
    reason: str = ""


class Tracker(Protocol):
    """What the pipeline tells about a run. No method waits for a server except `wait_for_run_id` and `end`, which are bounded."""

    def connect(self) -> None: ...
    def params(self, values: Mapping[str, object]) -> None: ...
    def tags(self, values: Mapping[str, str]) -> None: ...
    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, object]) -> None: ...
    def bundle(self, name: str, *, aliases: Sequence[str] = (), tags: Mapping[str, str] | None = None) -> None: ...
    def flush_metrics(self) -> None: ...
    def wait_for_run_id(self, timeout_seconds: float) -> str | None: ...
    def end(self, status: Status, timeout_seconds: float | None = None) -> Delivery: ...


class NoTracker:
    """Tells nobody."""

    def connect(self) -> None: ...
    def params(self, values: Mapping[str, object]) -> None: ...
    def tags(self, values: Mapping[str, str]) -> None: ...
    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, object]) -> None: ...
    def bundle(self, name: str, *, aliases: Sequence[str] = (), tags: Mapping[str, str] | None = None) -> None: ...
    def flush_metrics(self) -> None: ...

    def wait_for_run_id(self, timeout_seconds: float) -> str | None:
        return None

    def end(self, status: Status, timeout_seconds: float | None = None) -> Delivery:
        return Delivery(complete=True)


def open_run(
    run: RunDir,
    *,
    workspace: Path,
    experiment: str,
    name: str,
    parent_run_id: str | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, object] | None = None,
    connect: bool = True,
) -> MlflowTracker:
    """Start mirroring `run`; returns at once, the connection is made in the background.

    A folder that was tracked before goes on with the MLflow run it had, also after a kill left that run RUNNING. The first use of
    a new database takes three seconds of Python: where much else of that is to be done, say ``connect=False``, and have it wait
    for `MlflowTracker.connect`.
    """
    record = read_record(run) or RunRecord(experiment, name, time.time(), uuid.uuid4().hex)
    record = replace(
        record,
        run_id=run_id or record.run_id,
        parent_run_id=parent_run_id or record.parent_run_id,
        attempts=record.attempts + 1,
        status="RUNNING",
        ended_at=None,
        complete=False,
    )
    tracker = MlflowTracker(run, State(run, record), workspace)
    tracker.tags({"finetune.attempts": str(record.attempts), **(tags or {})})
    tracker.params(params or {})
    if connect:
        tracker.connect()
    return tracker


def replay(run: RunDir, workspace: Path, status: Status | None = None) -> Delivery:
    """Send what MLflow lacks of a run that is over; safe to repeat. `status` closes a run whose process died before it could."""
    record = read_record(run)
    if record is None:
        return Delivery(complete=False, reason=f"{run.root} was never tracked: it holds no mlflow.json")
    if status:
        record = replace(record, status=status, ended_at=record.ended_at or time.time())
    tracker = MlflowTracker(run, State(run, record), workspace)
    reason = tracker.deliver(last=True)
    return Delivery(complete=not reason, reason=reason)


class MlflowTracker:
    """Keeps one MLflow run equal to one run folder, from a thread of its own."""

    def __init__(self, run: RunDir, state: State, workspace: Path) -> None:
        self._run, self._state, self._workspace = run, state, workspace
        self._link: Link | None = None
        self._wake, self._tried, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._reason = ""  # why the last attempt failed
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    @property
    def record(self) -> RunRecord:
        return self._state.record

    def connect(self) -> None:
        """Begin to send what is told; until then it is noted. Waiting for MLflow begins it too."""
        if self._thread.ident is None:
            self._thread.start()

    def params(self, values: Mapping[str, object]) -> None:
        """Add to the params; a key that was given before keeps its first value, as MLflow demands."""
        self._want(params={**_texts(values), **self.record.params})

    def tags(self, values: Mapping[str, str]) -> None:
        self._want(tags={**self.record.tags, **_texts(values)})

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, object]) -> None:
        """Name the data by its manifest digest; `profile` holds counts. No pixel is sent."""
        entry = {
            "name": name,
            "digest": digest[:_MAX_DIGEST_CHARACTERS],
            "source": json.dumps({"uri": source}),
            "profile": json.dumps({"digest": digest, **profile}),
        }
        self._want(datasets=[*(known for known in self.record.datasets if known["name"] != name), entry])

    def bundle(self, name: str, *, aliases: Sequence[str] = (), tags: Mapping[str, str] | None = None) -> None:
        """Register the run's ``bundle/`` as a version of the model `name`; ``models:/name@alias`` then downloads all of it."""
        # MLflow keeps these names for itself, and resolves models:/name/latest without any alias.
        allowed = [alias for alias in aliases if alias != "latest" and not re.fullmatch(r"[vV]\d+", alias)]
        self._want(model={"name": name, "aliases": allowed, "tags": dict(tags or {})})

    def flush_metrics(self) -> None:
        """Ask for the journal to be sent now instead of within two seconds."""
        self._wake.set()

    def wait_for_run_id(self, timeout_seconds: float) -> str | None:
        """The id that MLflow gave to this run, which its children need; None if MLflow does not answer."""
        self.connect()
        self._tried.wait(timeout_seconds)
        return self.record.run_id

    def end(self, status: Status, timeout_seconds: float | None = None) -> Delivery:
        """Close the MLflow run after everything is sent. What was not sent in time stays in the run folder for `replay`."""
        timeout_seconds = _END_SECONDS[status] if timeout_seconds is None else timeout_seconds
        self._state.change(status=status, ended_at=time.time())
        self._ending.set()
        self._wake.set()
        self.connect()
        self._thread.join(timeout_seconds)
        if self.record.complete:
            return Delivery(complete=True)
        reason = self._reason or f"no answer within {timeout_seconds:g} s"
        self._note(
            "mlflow_incomplete", f"MLflow has not everything of this run ({reason}); it is all in this folder, to be sent later"
        )
        return Delivery(complete=False, reason=reason)

    def deliver(self, *, last: bool = False) -> str:
        """Send what is missing, each part for itself; the reason for the first failure, or the empty string."""
        reason = _attempt(self._connect)
        self._tried.set()
        if self._link is None:
            return reason
        for part in self._link.parts(last=last):
            failure = _attempt(part)
            reason = reason or failure
        if last and not reason:
            self._state.change(complete=True)
        return reason

    def _connect(self) -> None:
        self._link = self._link or Link(destination(self._workspace), self._run, self._state)

    def _want(self, **changes: Any) -> None:
        self._state.change(complete=False, **changes)
        self._wake.set()

    def _work(self) -> None:
        failures = 0
        while True:
            self._wake.clear()
            ending = self._ending.is_set()
            reason = self.deliver(last=ending)
            self._report(reason)
            if ending:
                return
            failures = failures + 1 if reason else 0
            if reason:
                self._ending.wait(min(_RETRY_SECONDS, _FLUSH_SECONDS * 2**failures))
            else:
                self._wake.wait(_FLUSH_SECONDS)

    def _report(self, reason: str) -> None:
        """One event when MLflow stops answering, one when it is back; not one for each attempt."""
        if reason and not self._reason:
            logging.getLogger(__name__).warning("MLflow: %s", reason)
            self._note(
                "mlflow_unavailable", f"MLflow cannot be written ({reason}). The run goes on; what was not sent is sent later"
            )
        if self._reason and not reason:
            self._note("mlflow_recovered", "MLflow answers again; it has what it missed")
        self._reason = reason

    def _note(self, kind: str, message: str) -> None:
        with contextlib.suppress(OSError):  # the disk is full: the run itself will say so
            self._run.event(kind, message)


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {key_text(key): value_text(value) for key, value in values.items()}


def _attempt(part: Callable[[], None]) -> str:
    """Run `part`; why it failed, or the empty string.

    The one broad catch of the project. Whatever MLflow, its database driver, its HTTP stack or its import raises, the run must go
    on: everything that would have been sent is in the run folder and is sent later. The reason goes to the run's events.
    """
    try:
        part()
    except Exception as error:  # noqa: BLE001
        return without_credentials(f"{type(error).__name__}: {str(error).strip()[:300]}")
    return ""
