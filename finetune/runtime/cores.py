"""How many cores there are to compute with."""

from __future__ import annotations

import os
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores(quota: Path = CPU_QUOTA) -> int:
    """The cores this process may use: its CPU affinity, and a container's quota, which `os.cpu_count` does not know."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not quota.exists():
        return cores
    limit, period = quota.read_text().split()
    return cores if limit == "max" else max(1, min(cores, int(limit) // int(period)))
