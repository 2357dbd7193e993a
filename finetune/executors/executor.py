"""The executor protocol: start, watch and stop a process. It is independent of the job database."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune.runtime.cores import CORES_VARIABLE

EXIT_BUSY = os.EX_TEMPFAIL  # the process could not begin: something that it needs is locked, or not available yet


@dataclass(frozen=True)
class Resources:
    """The number of cores and the CUDA devices (by number; empty: no GPU) that a process may use."""

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
    """Starts, watches and stops attempts.

    Every method may raise `ExecutorError` if the executor cannot be reached at the moment; the caller may try again.
    """

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
        """Start `command` in a new process group and append its output to `log`.

        Args:
            fence: number of the claim, different for each claim of one job.
        """

    def poll(self, handle: Handle) -> int | None:
        """Return None while the attempt runs, then once its exit code (negative: the signal that ended it).

        After that the handle is no longer known.
        """

    def memory_bytes(self, handle: Handle) -> int | None:
        """Return the memory that the attempt uses now; None if the executor cannot tell."""

    def cancel(self, handle: Handle, *, grace_seconds: float) -> None:
        """Ask the attempt to stop (SIGTERM) and return at once; the first `poll` after `grace_seconds` kills it.

        If this is called several times, the earliest of the times to kill applies.
        """
