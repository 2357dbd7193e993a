"""How a training process knows that the job is still its worker's: a file that the worker renews and the process watches.

The worker holds the lease in the database; the process has no database. So the worker writes beside the run how long the process
may go on. A process whose lease is running out (its worker was stopped, killed, or cut off) stops itself: first with SIGTERM, on
which training writes a checkpoint and ends, and at the latest with the lease itself, before anybody else can have the job.

On another machine than the worker's the two clocks cannot be compared. There a lease counts from when its renewal was seen, so it
may end later than the worker's by as long as the shared disk takes to show a change.
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
WARNING_FRACTION = 2 / 3  # of the lease: when a process that heard nothing begins to stop
EXIT_LEASE_ENDED = 130  # as an interrupted run: the job goes on elsewhere

_LINE = "{:020.3f} {:020.3f} {:<36}\n"  # a boot id has 36 characters


class Lease(NamedTuple):
    """For `seconds` from `asked_at` on, which was read on the clock `epoch`."""

    asked_at: float
    seconds: float
    epoch: str


def write_lease(path: Path, asked_at: LeaseTime, seconds: float) -> None:
    """Allow the process to go on until `seconds` after `asked_at`.

    `asked_at` is when the worker asked the database for the lease, read beforehand on this machine's clock: a worker that was
    stopped since then allows nothing that has passed. The file keeps its size and is overwritten in place, which also works when
    the disk is full, and needs no flush: a lease does not outlive the machine.
    """
    line = _LINE.format(asked_at.seconds, seconds, asked_at.epoch).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, line, 0)
    finally:
        os.close(descriptor)


def read_lease(path: Path) -> Lease | None:
    """What was allowed last; None where it was withdrawn."""
    try:
        asked_at, seconds, epoch = path.read_text().split()
    except FileNotFoundError:
        return None
    return Lease(float(asked_at), float(seconds), epoch)


def watch_lease_from_environment() -> None:
    """In a process that a worker started: stop it when its lease ends. Anywhere else: nothing."""
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
