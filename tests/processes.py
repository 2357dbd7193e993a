"""What Linux tells of processes, for tests. A process may end at any moment: each of these functions has an answer then too."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

EXEC_SECONDS = 10.0  # a process that becomes another program is done by then, on a busy machine too
KERNEL_THREAD = 0x00200000  # PF_KTHREAD: such a process never has an environment


def all_processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def environment_of(pid: int) -> bytes:
    """Return the environment that a process began with.

    While a process becomes another program, it shows none for a moment, in which its parent may go on already. So that it has
    none is believed only of a process that keeps showing none, and of a thread of the kernel.
    """
    deadline = time.monotonic() + EXEC_SECONDS
    with suppress(OSError):
        while not (found := Path(f"/proc/{pid}/environ").read_bytes()) and may_show_one(pid) and time.monotonic() < deadline:
            time.sleep(0.001)
        return found
    return b""


def may_show_one(pid: int) -> bool:
    """Return whether a process may still show an environment: it is running, and no thread of the kernel."""
    state = status_of(pid)
    return bool(state) and state[0] not in (b"Z", b"X") and not int(state[6]) & KERNEL_THREAD


def parent_of(pid: int) -> int:
    state = status_of(pid)
    return int(state[1]) if state else 0


def status_of(pid: int) -> list[bytes]:
    """Return the fields of ``/proc/<pid>/stat`` from the third on (state, parent, …); none where the process is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return []


def children_of(pid: int) -> list[int]:
    """Return the ids of the processes that a process has started itself and that have not been waited for."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # a thread that has ended since
                found += map(int, (task / "children").read_text().split())
    return found


def lineage(pid: int) -> set[int]:
    """Return a process id and those of its ancestors."""
    found: set[int] = set()
    while pid > 1 and pid not in found:
        found.add(pid)
        pid = parent_of(pid)
    return found


def is_running(pid: int) -> bool:
    """Return whether a process has not ended; one that has ended and was not waited for yet is not running."""
    state = status_of(pid)
    return bool(state) and state[0] not in (b"Z", b"X")


def command_line(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").strip()
    return b""
