"""Measure the memory of a process and its descendants on Linux."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")


def memory_of_tree(pid: int) -> int | None:
    """Return the memory in bytes of a process and its descendants; None if the process has ended or it cannot be measured.

    A page that several processes share is divided among them (proportional set size), so that the sum counts it once.
    """
    sizes = [size for one in _tree(pid) if (size := _proportional_bytes(one)) is not None]
    return sum(sizes) if sizes else None


def _tree(pid: int) -> Iterator[int]:
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        yield one
        for task in _listed(_PROC / str(one) / "task"):
            with contextlib.suppress(OSError):
                waiting += map(int, (task / "children").read_text().split())


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # it has ended meanwhile
        return []


def _proportional_bytes(pid: int) -> int | None:
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", (_PROC / str(pid) / "smaps_rollup").read_text(), re.M)
        if found is not None:
            return int(found[1]) * 1024
        return int((_PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return None
