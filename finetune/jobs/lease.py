"""How a training process knows that the job is still its worker's: a file that the worker renews and the process watches.

The worker holds the lease in the database; the process has no database. So the worker writes beside the run when the lease ends,
and a process whose lease has run out (its worker was stopped, killed, or cut off) stops itself: first with SIGTERM, on which
training writes a checkpoint and ends, then for good.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from finetune.rundir import read_json, write_json

LEASE_VARIABLE = "FINETUNE_LEASE"
GRACE_SECONDS = 20.0


def write_lease(path: Path, seconds: float) -> None:
    """Allow the run to go on for `seconds` from now, on the clock that nobody sets."""
    write_json(path, {"until": time.clock_gettime(time.CLOCK_MONOTONIC) + seconds})


def lease_ended(path: Path) -> bool:
    """Whether the lease has run out, or was withdrawn (the file is gone)."""
    try:
        return bool(time.clock_gettime(time.CLOCK_MONOTONIC) > read_json(path)["until"])
    except FileNotFoundError:
        return True


def watch_lease_from_environment() -> None:
    """In a process that a worker started: stop it when its lease ends. Anywhere else: nothing."""
    if path := os.environ.get(LEASE_VARIABLE):
        threading.Thread(target=_watch, args=(Path(path),), name="lease", daemon=True).start()


def _watch(path: Path, every_seconds: float = 1.0) -> None:
    while not lease_ended(path):
        time.sleep(every_seconds)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(os.EX_TEMPFAIL)
