"""Keep MLflow up to date with a worker's jobs: runs (also of killed processes) and the model registry.

MLflow is not imported here. A separate process (`finetune.tracking.sync`) does the work, one at a time; it is started again later
if MLflow does not respond.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from finetune.jobs.store import JobStore
from finetune.storage.files import found_in, modified_ns, read_json
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace

STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
PULL_SECONDS = 300.0  # how often to check MLflow's registry for changes
_LOOK_SECONDS = 10.0
_OVERLAP_SECONDS = 60.0  # a job's end may be committed a little later than its `finished_at`
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 60.0, 3600.0


class TrackingSync:
    """The synchronisation of one worker. Call `step` often, and `finish` at the end to wait for the last process."""

    def __init__(self, store: JobStore, home: Path) -> None:
        self.store = store
        self.workspace = Workspace.at(home)
        self._is_installed = importlib.util.find_spec("mlflow") is not None
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: set[str] = set()  # job ids
        self._open: dict[str, str] = {}  # run folder -> status
        self._asked: dict[str, str] = {}  # those of `_open` that were passed to the current process
        self._looked_at = self._wait_until = -_LOOK_SECONDS  # monotonic seconds
        self._ended_after = 0.0  # Unix seconds
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._models: object = None  # state of the registries at the last synchronisation
        self._models_asked: object = None  # state of the registries when the current process was started
        self._pulled_at = -PULL_SECONDS

    def step(self) -> None:
        """Look for ended jobs and changed models; start a process if there is something to send and none is running."""
        if not self._is_installed:
            return
        now = time.monotonic()
        if self._process is not None and (code := self._process.poll()) is not None:
            self._note_ended_process(code)
        if now - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = now
        self._find_incomplete_runs()
        models = self._models_changed(now)
        if self._process is None and (self._open or models) and now >= self._wait_until:
            self._start(models=models)

    def finish(self, seconds: float) -> None:
        """Synchronise the jobs that have ended by now, for at most `seconds`."""
        until = time.monotonic() + seconds
        self._looked_at = -_LOOK_SECONDS
        self.step()
        while self._process is not None and time.monotonic() < until:
            time.sleep(0.1)
            self.step()

    def stop(self) -> None:
        """Kill the current process; the next worker sends what it did not."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _find_incomplete_runs(self) -> None:
        ended_at = time.time()
        for job_id, state in self.store.ended_since(self._ended_after):
            run = RunDir(self.workspace.runs / job_id)
            if job_id not in self._seen and _is_incomplete(run):
                self._open[str(run.root)] = STATUS[state]
            self._seen.add(job_id)
        self._ended_after = ended_at - _OVERLAP_SECONDS

    def _models_changed(self, now: float) -> bool:
        """Return whether an alias or a version has changed in the models folder, or may have changed in MLflow."""
        elsewhere = "MLFLOW_TRACKING_URI" in os.environ
        if not elsewhere and not self.workspace.mlflow_database.exists():
            return False  # nothing was ever tracked
        if self._registries()[0] != (self._models or ((), None))[0]:  # type: ignore[index]
            return True
        pull = now - self._pulled_at >= PULL_SECONDS
        return pull and (elsewhere or self._registries() != self._models)

    def _registries(self) -> tuple[tuple[tuple[str, int], ...], int | None]:
        """Return the modification times of each model, and of MLflow's database if it is the workspace's own file."""
        found = {path: modified_ns(path) for path in sorted(found_in(self.workspace.models, "*/aliases.json"))}
        changed = tuple((str(path), at) for path, at in found.items() if at is not None)
        return changed, modified_ns(self.workspace.mlflow_database)

    def _start(self, *, models: bool) -> None:
        self._asked, self._models_asked = dict(self._open), self._registries()[0] if models else None
        die_with_parent = [sys.executable, "-m", "finetune.executors.process_parent", str(os.getpid())]
        self._process = subprocess.Popen(
            [*die_with_parent, sys.executable, "-m", "finetune.tracking.sync"],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C must reach the worker only
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(json.dumps({"home": str(self.workspace.root), "runs": self._asked, "models": models}).encode())

    def _note_ended_process(self, code: int) -> None:
        self._process = None
        now = time.monotonic()
        if code != 0:
            self._wait_until = now + self._pause_seconds
            self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
            return
        self._open = {run: status for run, status in self._open.items() if run not in self._asked}
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        if self._models_asked is not None:
            # Changes since the process was started are not in this state, so they are detected as changes again.
            self._models, self._pulled_at = (self._models_asked, self._registries()[1]), now


def mlflow_run_of(run: RunDir) -> str | None:
    """Return MLflow's id of a run or a comparison; None if it is not in MLflow (yet)."""
    sent = _state_of(run)["runs"].get(".")
    return None if sent is None else sent["id"]


def _is_incomplete(run: RunDir) -> bool:
    """Return whether a run was to be mirrored to MLflow but its folder does not record it as complete."""
    return not _state_of(run)["complete"]


def _state_of(run: RunDir) -> dict[str, Any]:
    """Return the state of the run's mirror in MLflow, as `finetune.tracking.mirror` recorded it in the run folder."""
    try:
        found: dict[str, Any] = read_json(run.tracking / "mlflow.json")
    except FileNotFoundError:
        return {"runs": {}, "complete": True}
    return found
