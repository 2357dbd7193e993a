"""Run attempts as child processes on this machine, which end when this process ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.executors.executor import Handle, Resources
from finetune.executors.memory import memory_of_tree


@dataclass
class _Child:
    """A started process, and when it is to be killed."""

    process: subprocess.Popen[bytes]
    kill_at: float | None = None  # monotonic seconds


class LocalExecutor:
    """An executor whose attempts are child processes of this process and end with it."""

    def __init__(self) -> None:
        self._children: dict[str, _Child] = {}  # by `Handle.reference`, the process id

    def start(
        self,
        job_id: str,
        command: Sequence[str],
        *,
        fence: int,
        environment: Mapping[str, str],
        log: Path,
        resources: Resources,
    ) -> Handle:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("start attempts from the main thread: a child dies with the thread that started it")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "finetune.executors.process_parent", str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **resources.environment(), **environment},
            )
        self._children[str(process.pid)] = _Child(process)
        return Handle(job_id, str(process.pid))

    def poll(self, handle: Handle) -> int | None:
        child = self._children[handle.reference]
        if child.kill_at is not None and time.monotonic() >= child.kill_at:
            _signal_group(child.process, signal.SIGKILL)
        code = child.process.poll()
        if code is not None:
            _signal_group(child.process, signal.SIGKILL)  # ends all processes that the attempt has started
            del self._children[handle.reference]
        return code

    def memory_bytes(self, handle: Handle) -> int | None:
        return memory_of_tree(int(handle.reference))

    def cancel(self, handle: Handle, *, grace_seconds: float) -> None:
        child = self._children[handle.reference]
        kill_at = time.monotonic() + grace_seconds
        if child.kill_at is None:
            child.kill_at = kill_at
            _signal_group(child.process, signal.SIGTERM)
        child.kill_at = min(child.kill_at, kill_at)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
