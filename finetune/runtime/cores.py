"""Count the processor cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
CORES_VARIABLE = "FINETUNE_CORES"  # set for a process that shares the machine with others


def available_cores(quota: Path = CPU_QUOTA) -> int:
    """Return the number of cores that this process may use.

    It is the smallest of the process's CPU affinity, the container's CPU quota (which `os.cpu_count` ignores) and the environment
    variable ``FINETUNE_CORES``.
    """
    cores = _cores_of_machine(quota)
    given = os.environ.get(CORES_VARIABLE, "")
    return min(cores, max(1, int(given))) if given.isdecimal() else cores


def _cores_of_machine(quota: Path) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not quota.exists():
        return cores
    limit, period = quota.read_text().split()
    return cores if limit == "max" else max(1, min(cores, int(limit) // int(period)))
