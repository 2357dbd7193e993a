"""Mirror a run folder to one tracker incrementally: send what is new, record what was sent, and never send anything twice.

The same code serves a live run, a run that was resumed after a kill, and a run that the tracker missed. What was sent is recorded
in the folder itself, in ``tracking/<tracker>.json``. The children of a study are mirrored with it, each as a separate run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.errors import DiskFull
from finetune.storage.files import file_lock, read_json, sha256_file, write_json
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking.description import describe
from finetune.tracking.journal import Journal, LastPoints, points_of
from finetune.tracking.tracker import Choice, Place, Tracker, open_tracker
from finetune.tracking.view import RunView, Status, children, files_of, read_view, top_of

MOST_FAILURES = 3  # in one update


@dataclass
class Sent:
    """The record of what was sent of one run to a tracker."""

    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    id: str | None = None  # the tracker's id of the run
    facts: str = ""  # digest of the facts
    figures: str = ""  # digest of the final figures
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256
    marks: dict[str, list[Any]] = field(default_factory=dict)  # metric -> step and value of its last point
    model: str = ""  # digest of the model's description
    model_id: str | None = None

    def reached(self) -> LastPoints:
        """Return the marks of the metrics that were sent."""
        return LastPoints({key: (step, value) for key, (step, value) in self.marks.items()})

    def forgotten(self) -> Sent:
        """Return a record with the same key and nothing sent."""
        return Sent(key=self.key)


@dataclass
class MirrorState:
    """The content of ``tracking/<tracker>.json``; `runs` by their path inside the folder, ``.`` for the folder itself."""

    experiment: str
    destination: str = ""
    attempts: int = 0  # processes that followed the run while it went on
    complete: bool = False  # the run has ended, and the tracker has all of it
    reason: str = ""  # why the tracker lacks something
    runs: dict[str, Sent] = field(default_factory=dict)


def state_file(run: RunDir, kind: str) -> Path:
    """Return the path of the file that records what was sent of a run to a tracker of this kind."""
    return run.tracking / f"{kind}.json"


def read_state(run: RunDir, kind: str) -> MirrorState | None:
    """Return the recorded state of a run's mirror; None if the run was never meant to be mirrored to this tracker."""
    try:
        found = read_json(state_file(run, kind))
    except FileNotFoundError:
        return None
    return MirrorState(**{**found, "runs": {name: Sent(**sent) for name, sent in found["runs"].items()}})


def write_state(run: RunDir, kind: str, state: MirrorState) -> None:
    """Write the state of a run's mirror. Errors of a full disk are ignored here: the run itself reports them."""
    with contextlib.suppress(OSError, DiskFull):
        write_json(state_file(run, kind), asdict(state))


def tracked_as(run: RunDir, kind: str) -> str | None:
    """Return the id of a run or of a study's child in a tracker; None if it is not there."""
    top = top_of(run)
    state = read_state(top, kind)
    sent = state.runs.get(run.root.relative_to(top.root).as_posix()) if state else None
    return sent.id if sent else None


@contextlib.contextmanager
def mirroring_lock(run: RunDir, kind: str, *, seconds: float) -> Iterator[bool]:
    """Hold the lock on mirroring this run to this tracker; yield whether it was acquired within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        with file_lock(run.tracking / f".{kind}.lock", wait=False) as had:
            if had or time.monotonic() >= deadline:
                yield had
                return
        time.sleep(0.1)


class Mirror:
    """Mirrors one run folder to one tracker. Only `update` contacts the tracker, and only if there is something to send."""

    def __init__(self, run: RunDir, choice: Choice, workspace: Workspace, experiment: str) -> None:
        self.run, self.choice, self.workspace = run, choice, workspace
        self.state = read_state(run, choice.kind) or MirrorState(experiment)
        self._tracker: Tracker | None = None
        self._begun: set[str] = set()
        self._journals: dict[str, Journal] = {}
        self._digests: dict[Path, tuple[tuple[int, int], str]] = {}
        self._views: dict[str, tuple[object, RunView, str]] = {}
        self._reason, self._failures = "", 0

    def update(self, *, alive: bool, ended_as: Status | None = None, thorough: bool = False) -> str:
        """Send what the tracker lacks; return the reason why something could not be sent, or an empty string.

        Args:
            alive: whether a process is working on the run.
            ended_as: the final status of a run whose process died before it could record it.
            thorough: also check that the tracker still has what was sent earlier.
        """
        self._reason, self._failures = "", 0
        if thorough:
            self._begun.clear()
        self._attempt(lambda: self._update_run(self.run, None, alive, ended_as, thorough))
        if self._tracker is not None:
            self._attempt(self._tracker.flush)
        self.state.reason = self._reason
        self.state.complete = not alive and not self._reason
        write_state(self.run, self.choice.kind, self.state)
        return self._reason

    def _update_run(self, run: RunDir, parent: str | None, alive: bool, ended_as: Status | None, thorough: bool) -> None:
        name = self._name(run)
        view, description = self._view(run, name, alive, ended_as)
        sent = self.state.runs.setdefault(name, Sent())
        unsent = self._unsent(run, name, view, description, sent)
        if unsent or thorough or sent.id is None:
            self._begin(run, name, view, parent)
            if self.state.runs[name] is not sent:  # the tracker does not have it, or no longer
                sent = self.state.runs[name]
                unsent = self._unsent(run, name, view, description, sent)
            for part in unsent:
                self._attempt(part)
            write_state(self.run, self.choice.kind, self.state)
        if view.status == "RUNNING" and run == self.run and view.expected_headline is not None:
            self._attempt(lambda: self._connected().sample(self._id(name), view))
        for child in children(run):
            self._attempt(lambda child=child: self._update_run(child, self._id(name), alive, ended_as, thorough))  # type: ignore[misc]

    def _view(self, run: RunDir, name: str, alive: bool, ended_as: Status | None) -> tuple[RunView, str]:
        """Return the view and the description of a run, cached until its files change."""
        runs = [run, *children(run)]
        paths = [
            path
            for one in runs
            for path in (one.spec, one.request, one.resolved, one.outcome, one.error, one.study, one.comparison)
        ]
        stamp = (alive, ended_as, tuple(_stamp(path) for path in paths))
        known = self._views.get(name)
        if known is None or known[0] != stamp:
            view = read_view(run, alive=alive, ended_as=ended_as, experiment=self.state.experiment)
            if run == self.run and self.state.attempts > 1:
                view = replace(view, tags={**view.tags, "finetune.attempts": str(self.state.attempts)})
            known = (stamp, view, describe(run, view))
            self._views[name] = known
        return known[1], known[2]

    def _unsent(self, run: RunDir, name: str, view: RunView, description: str, sent: Sent) -> list[Callable[[], None]]:
        """Return the calls that send what the tracker lacks, in order: final figures first, the final status last."""
        parts: list[Callable[[], None]] = []
        ended = view.status != "RUNNING"
        own = {"figures": {}, "costs": {}, "started_at": 0, "ended_at": 0}  # compared and sent separately
        facts = _digest([{**asdict(view), **own}, description])
        if ended and not sent.facts:
            parts.append(lambda: self._connected().facts(self._id(name), replace(view, status="RUNNING"), description))
        if not ended and sent.facts != facts:  # before the first point, since they announce the headline
            parts.append(lambda: self._send_facts(name, view, description, sent, facts))
        model = _digest([asdict(view.model) if view.model else None])
        if view.model is not None and view.model.bundle.is_dir() and sent.model != model:
            parts.append(lambda: self._send_model(name, view, sent, model))
        figures = _digest([dict(view.figures), dict(view.costs)])
        if ended and (view.figures or view.costs) and sent.figures != figures:
            parts.append(lambda: self._send_figures(name, view, sent, figures))
        # Only after `facts` has announced the headline: trackers list metrics in the order in which they were first logged.
        if (ended or view.expected_headline is not None) and self._has_points(run, name, sent):
            parts.append(lambda: self._send_points(name, sent))
        parts += self._unsent_files(run, name, sent)
        if ended and sent.facts != facts:
            parts.append(lambda: self._send_facts(name, view, description, sent, facts))
        return parts

    def _begin(self, run: RunDir, name: str, view: RunView, parent: str | None) -> None:
        if name in self._begun:
            return
        tracker, sent = self._connected(), self.state.runs[name]
        write_state(self.run, self.choice.kind, self.state)  # with its key, by which the run is found if this process dies now
        run_id, is_new = tracker.begin(view, Place(self.state.experiment, run.root, sent.key, parent, sent.id))
        if is_new or run_id != sent.id:
            self.state.runs[name] = replace(sent.forgotten(), id=run_id)
            self._journals.pop(name, None)  # to be read from the beginning
        self._begun.add(name)

    def _has_points(self, run: RunDir, name: str, sent: Sent) -> bool:
        """Return whether the journal has points that were not sent. False for a study, whose journal is a copy of a child's."""
        if run.study.exists():
            return False
        journal, marks = self._journals.setdefault(name, Journal(run.metrics)), sent.reached()
        if any(marks.add(point) for records in journal.unread() for record in records for point in points_of(record)):
            return True
        journal.accept()
        return False

    def _send_points(self, name: str, sent: Sent) -> None:
        journal = self._journals[name]
        for records in journal.unread():
            marks = sent.reached()
            points = [point for record in records for point in points_of(record) if marks.add(point)]
            if points:
                self._connected().points(self._id(name), points)
            sent.marks = marks.to_dict()
            journal.accept()

    def _unsent_files(self, run: RunDir, name: str, sent: Sent) -> list[Callable[[], None]]:
        parts = []
        for file in files_of(run):
            inside, digest = file.relative_to(run.root).as_posix(), self._digest_of(file)
            if digest is not None and sent.files.get(inside) != digest:
                parts.append(lambda file=file, inside=inside, digest=digest: self._send_file(name, file, inside, digest, sent))
        return parts  # type: ignore[return-value]

    def _send_file(self, name: str, file: Path, inside: str, digest: str, sent: Sent) -> None:
        self._connected().file(self._id(name), file, inside)
        sent.files[inside] = digest

    def _send_model(self, name: str, view: RunView, sent: Sent, digest: str) -> None:
        sent.model_id = self._connected().model(self._id(name), view)
        sent.model = digest

    def _send_figures(self, name: str, view: RunView, sent: Sent, digest: str) -> None:
        self._connected().figures(self._id(name), view, sent.model_id)
        sent.figures = digest

    def _send_facts(self, name: str, view: RunView, description: str, sent: Sent, digest: str) -> None:
        self._connected().facts(self._id(name), view, description)
        sent.facts = digest

    def _digest_of(self, file: Path) -> str | None:
        """Return the sha256 of a file, cached by modification time and size; None if the file no longer exists."""
        stamp = _stamp(file)
        if stamp is None:
            return None
        known = self._digests.get(file)
        if known is None or known[0] != stamp:
            known = (stamp, sha256_file(file))
            self._digests[file] = known
        return known[1]

    def _connected(self) -> Tracker:
        if self._tracker is None:
            self._tracker = open_tracker(self.choice, self.workspace)
            self.state.destination = self._tracker.destination
        return self._tracker

    def _id(self, name: str) -> str:
        run_id = self.state.runs[name].id
        assert run_id is not None, f"{name} has not begun"
        return run_id

    def _name(self, run: RunDir) -> str:
        return run.root.relative_to(self.run.root).as_posix()

    def _attempt(self, part: Callable[[], None]) -> None:
        """Call `part` and catch its exceptions; record the reason of the first failure.

        The broad catch is intended: whatever a tracker's library, database driver or HTTP client raises, the other parts must
        still be sent. What was not sent is in the run folder and is sent by the next update. After `MOST_FAILURES` failures the
        remaining parts are skipped, since the tracker is probably unavailable.
        """
        if self._failures >= MOST_FAILURES:
            return
        try:
            part()
        except Exception as error:  # noqa: BLE001
            self._failures += 1
            self._reason = self._reason or without_credentials(f"{type(error).__name__}: {str(error).strip()[:300]}")


def without_credentials(text: str) -> str:
    """Return the text with the user and password of every URL in it masked."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return (stat.st_mtime_ns, stat.st_size)


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values, default=str, sort_keys=True).encode()).hexdigest()[:16]
