"""Tell MLflow that a job has ended, also when the run was killed before it could report its end itself.

MLflow is not imported here: a process of its own does the telling, one at a time, and again later while MLflow does not answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from finetune.jobs.store import JobStore
from finetune.storage.rundir import RunDir

STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
_LOOK_SECONDS = 10.0
_OVERLAP_SECONDS = 60.0  # a job's end may be committed a little after the time that it says
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 60.0, 3600.0


class Closing:
    """Of one worker: `step` it often; `finish` waits for what is under way."""

    def __init__(self, store: JobStore, home: Path) -> None:
        self.store = store
        self.home = home
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: set[str] = set()  # job ids
        self._open: dict[str, str] = {}  # run folder → status
        self._telling: dict[str, str] = {}  # those of `_open` that the process was given
        self._looked_at = self._wait_until = -_LOOK_SECONDS  # monotonic seconds
        self._ended_after = 0.0  # Unix seconds
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    def step(self) -> None:
        """Look for jobs that have ended, and tell of them if nobody is being told just now."""
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            self._look()
        if self._process is not None and (code := self._process.poll()) is not None:
            self._settle(code)
        if self._process is None and self._open and now >= self._wait_until:
            self._tell()

    def finish(self, seconds: float) -> None:
        """Tell of what has ended by now, if that takes no longer than `seconds`."""
        self._looked_at = -_LOOK_SECONDS
        until = time.monotonic() + seconds
        self.step()
        while self._process is not None and time.monotonic() < until:
            time.sleep(0.1)
            self.step()

    def stop(self) -> None:
        """End a process that is at it; the next worker begins anew."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _look(self) -> None:
        ended_at = time.time()
        for job_id, state in self.store.ended_since(self._ended_after):
            run = RunDir(self.home / "runs" / job_id)
            if job_id not in self._seen and run.tracking.exists():
                self._open[str(run.root)] = STATUS[state]
            self._seen.add(job_id)
        self._ended_after = ended_at - _OVERLAP_SECONDS

    def _tell(self) -> None:
        self._telling = dict(self._open)
        die_with_parent = [sys.executable, "-m", "finetune.executors.process_parent", str(os.getpid())]
        self._process = subprocess.Popen(
            [*die_with_parent, sys.executable, "-m", "finetune.tracking.closing"],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the worker's to handle
            env={**os.environ, "FINETUNE_HOME": str(self.home)},
        )
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(json.dumps(self._telling).encode())

    def _settle(self, code: int) -> None:
        self._process = None
        if code == 0:
            self._open = {run: status for run, status in self._open.items() if run not in self._telling}
            self._pause_seconds = _FIRST_PAUSE_SECONDS
        else:
            self._wait_until = time.monotonic() + self._pause_seconds
            self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
