"""Share the resources of an executor among processes that run in parallel."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.executors import Executor, Resources, open_executor
from finetune.runtime.cores import available_cores
from finetune.runtime.device import visible_gpus

STOP_SECONDS = 20.0  # for a process to write a checkpoint when it is asked to stop


@dataclass(frozen=True)
class Slots:
    """An executor, and the resources of each process that it runs at the same time."""

    executor: Executor
    each: tuple[Resources, ...]

    @classmethod
    def of(cls, executor: str, slots: int, *, ray_address: str | None = None) -> Slots:
        """Share the resources among `slots` processes.

        On this machine, its cores and GPUs are divided; on a cluster, each process requests as many cores as this machine has.

        Raises:
            MissingExtra: Ray is not installed.
            ExecutorError: no cluster answers at the address.
        """
        gpus = visible_gpus()
        threads = max(1, available_cores() // slots) if executor == "local" else available_cores()
        each = tuple(Resources(threads, gpus[slot : slot + 1]) for slot in range(slots))
        return cls(open_executor(executor, ray_address=ray_address, stop_seconds=STOP_SECONDS), each)
