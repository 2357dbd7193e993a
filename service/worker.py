"""The server's worker: ``python -m finetune worker`` as a child process, restarted when it dies and stopped with the server.

It is a separate process because the server must not import the training libraries, and because a run that exhausts the memory
must not stop predictions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path

from finetune.distribution import install_command
from finetune.jobs.kinds import can_train

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
RESTART_SECONDS = 5.0
STOP_SECONDS = 25.0  # a running job writes a checkpoint first
NO_TRAINING = (
    "The worker of this installation answers batch predictions alone. Other jobs wait until a worker that can train runs on this "
    f"workspace: {install_command('train')}, then finetune worker"
)


class WorkerProcess:
    """One worker that is kept running. Call its methods on the main thread: the child ends with the thread that started it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the worker; log a warning if the training libraries are not installed."""
        if not can_train():
            log.warning(NO_TRAINING)
        self._process = self._spawn()
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """Stop the worker after it has returned its jobs to the queue."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _spawn(self) -> subprocess.Popen[bytes]:
        die_with_parent = [sys.executable, "-m", "finetune.executors.process_parent", str(os.getpid())]
        return subprocess.Popen(
            [*die_with_parent, sys.executable, "-m", "finetune", "worker"],
            env={**os.environ, "FINETUNE_HOME": str(self.home)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must reach only the server, which then stops the worker
        )

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            code = None if self._process is None else self._process.poll()
            if code is not None:
                log.error("the worker ended with exit code %d; another starts in %.0f s", code, RESTART_SECONDS)
                await asyncio.sleep(RESTART_SECONDS)
                self._process = self._spawn()
