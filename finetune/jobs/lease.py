"""The lease file, by which a training process knows that its worker still holds the job.

The worker holds the lease in the database, which the training process does not open. Therefore the worker writes into a file in
the run folder how long the process may continue. If the lease is not renewed (the worker was stopped, killed, or disconnected),
the process stops itself: first with SIGTERM, on which training writes a checkpoint and ends, and at the latest when the lease
ends, before another worker can claim the job.

On another machine than the worker's the two clocks cannot be compared. There a lease counts from the time at which its renewal
was seen, so it may end later than the worker's lease by the delay of the shared disk.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

from finetune.jobs.clock import LeaseTime, machine_time

LEASE_VARIABLE = "FINETUNE_LEASE"
WARNING_FRACTION = 2 / 3  # share of the lease after which a process without a renewal begins to stop
EXIT_LEASE_ENDED = 130  # as for an interrupted run: another worker continues the job

_LINE = "{:020.3f} {:020.3f} {:<36}\n"  # a boot id has 36 characters


class Lease(NamedTuple):
    """A lease of `seconds` beginning at `asked_at` on the clock `epoch`."""

    asked_at: float
    seconds: float
    epoch: str


def write_lease(path: Path, asked_at: LeaseTime, seconds: float) -> None:
    """Allow the process to continue until `seconds` after `asked_at`.

    `asked_at` is read on this machine's clock before the worker asks the database for the lease. Thus a worker that was suspended
    in between grants no more time than the database did. The file keeps its size and is overwritten in place, which works on a
    full disk too. It is not flushed, since a lease ends with the machine.
    """
    line = _LINE.format(asked_at.seconds, seconds, asked_at.epoch).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, line, 0)
    finally:
        os.close(descriptor)


def read_lease(path: Path) -> Lease | None:
    """Return the current lease, or None if it was withdrawn (the file was deleted)."""
    try:
        asked_at, seconds, epoch = path.read_text().split()
    except FileNotFoundError:
        return None
    return Lease(float(asked_at), float(seconds), epoch)


def watch_lease_from_environment() -> None:
    """Start a thread that stops this process when its lease ends; do nothing if no worker started the process."""
    if path := os.environ.get(LEASE_VARIABLE):
        threading.Thread(target=_watch, args=(Path(path),), name="lease", daemon=True).start()


def _watch(path: Path, every_seconds: float = 0.5) -> None:
    lease, seen_at, warned = None, 0.0, False
    while True:
        now, found = machine_time(), read_lease(path)
        if found != lease:
            lease, seen_at = found, now.seconds
        if lease is None:
            os._exit(EXIT_LEASE_ENDED)
        used = now.seconds - (lease.asked_at if lease.epoch == now.epoch else seen_at)
        if used > lease.seconds:
            os._exit(EXIT_LEASE_ENDED)
        if used > WARNING_FRACTION * lease.seconds and not warned:
            warned = True
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(every_seconds)
