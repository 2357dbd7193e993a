"""Where an attempt runs. An executor starts one process group for it, says how it ended, and ends it; it knows no database."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Resources:
    """What an attempt may use: CPU threads, and the CUDA devices by number (none: no GPU)."""

    threads: int = 1
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Handle:
    """A started attempt, as its executor knows it."""

    job_id: str
    reference: str


class Executor(Protocol):
    """Starts, watches and ends attempts."""

    def start(
        self, job_id: str, command: Sequence[str], *, environment: Mapping[str, str], log: Path, resources: Resources
    ) -> Handle:
        """Start `command` in a fresh process group, its output appended to `log`."""

    def poll(self, handle: Handle) -> int | None:
        """None while it runs, then the exit code (negative: the signal that ended it)."""

    def cancel(self, handle: Handle, *, grace_seconds: float) -> None:
        """Ask it to stop (SIGTERM) and return; a `poll` after `grace_seconds` ends it for good."""


class LocalExecutor:
    """Attempts as child processes of this one, which die with it."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._kill_at: dict[str, float] = {}  # job id -> monotonic seconds

    def start(
        self, job_id: str, command: Sequence[str], *, environment: Mapping[str, str], log: Path, resources: Resources
    ) -> Handle:
        leashed = [sys.executable, "-m", "finetune.jobs.leash", str(os.getpid()), *command]
        limits = {"OMP_NUM_THREADS": str(resources.threads), "CUDA_VISIBLE_DEVICES": ",".join(map(str, resources.gpus))}
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                leashed,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **limits, **environment},
            )
        self._processes[job_id] = process
        return Handle(job_id, str(process.pid))

    def poll(self, handle: Handle) -> int | None:
        process = self._processes[handle.job_id]
        if time.monotonic() > self._kill_at.get(handle.job_id, math.inf):
            _signal_group(process, signal.SIGKILL)
        code = process.poll()
        if code is not None:
            _signal_group(process, signal.SIGKILL)  # whatever the attempt itself started
            self._kill_at.pop(handle.job_id, None)
        return code

    def cancel(self, handle: Handle, *, grace_seconds: float) -> None:
        if handle.job_id not in self._kill_at:
            self._kill_at[handle.job_id] = time.monotonic() + grace_seconds
            _signal_group(self._processes[handle.job_id], signal.SIGTERM)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
