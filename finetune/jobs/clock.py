"""The clock that leases are read on: one that nobody sets.

On one machine that is the time since boot (suspension included), so a step of the wall clock (NTP, a person) ends no lease; the
boot's id is part of a lease, and a lease of another boot has ended with it. On PostgreSQL the server's clock is the one that all
workers share.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # training processes read this clock too, and have no database
    from sqlalchemy import Connection

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class LeaseTime(NamedTuple):
    """`seconds` on the clock named `epoch`; times of different epochs cannot be compared."""

    seconds: float
    epoch: str


def machine_time() -> LeaseTime:
    """The present on this machine's own clock, which all its processes share."""
    if hasattr(time, "CLOCK_BOOTTIME") and _BOOT_ID.exists():
        return LeaseTime(time.clock_gettime(time.CLOCK_BOOTTIME), _boot_id())
    return LeaseTime(time.time(), "wall")


def lease_time(connection: Connection) -> LeaseTime:
    """The present on the lease clock of this database."""
    if connection.dialect.name == "postgresql":
        seconds = connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())").scalar_one()
        return LeaseTime(float(seconds), "postgresql")
    return machine_time()


@functools.cache
def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()
