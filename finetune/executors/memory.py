"""How much memory a process and everything that it started take, as Linux counts it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")


def memory_of_tree(pid: int) -> int | None:
    """Return the bytes of memory that a process and its descendants take; None where the process is gone or nobody can say.

    Pages that several processes share are counted once, in parts (proportional set size).
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
