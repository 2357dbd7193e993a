"""The executor protocol: how a process is started, watched and ended. It knows no database."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune.runtime.cores import CORES_VARIABLE

EXIT_BUSY = os.EX_TEMPFAIL  # the process could not begin: something that it needs is taken, or not there yet


@dataclass(frozen=True)
class Resources:
    """What a process may use: cores, and the CUDA devices by number (none: no GPU)."""

    threads: int = 1
    gpus: tuple[int, ...] = ()

    def environment(self) -> dict[str, str]:
        """Return the environment variables that keep a process to these resources."""
        return {
            CORES_VARIABLE: str(self.threads),
            "OMP_NUM_THREADS": str(self.threads),
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus)),
        }


@dataclass(frozen=True)
class Handle:
    """A started attempt, as its executor knows it."""

    job_id: str
    reference: str


class Executor(Protocol):
    """Starts, watches and ends attempts. Each method may raise `ExecutorError`: it cannot say or do that now."""

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
        """Start `command` in a fresh process group, its output appended to `log`. A job's claims have different fences."""

    def poll(self, handle: Handle) -> int | None:
        """None while it runs, then, once, its exit code (negative: the signal that ended it)."""

    def memory_bytes(self, handle: Handle) -> int | None:
        """Return the memory that the attempt takes now; None where the executor cannot say."""

    def cancel(self, handle: Handle, *, grace_seconds: float) -> None:
        """Ask it to stop (SIGTERM) and return; a `poll` after `grace_seconds` ends it for good. The shortest grace counts."""
