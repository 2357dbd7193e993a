"""The clock that leases are read on: one that nobody sets.

On one machine that is the time since boot, so a step of the wall clock (NTP, a person) expires no lease; the boot's id is part of
a lease, and a lease from another boot has ended with it. On PostgreSQL the server's clock is the one that all workers share.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, text

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class LeaseTime(NamedTuple):
    """`seconds` on the clock named `epoch`; times of different epochs cannot be compared."""

    seconds: float
    epoch: str


def lease_time(connection: Connection) -> LeaseTime:
    """The present, on the lease clock of this database."""
    if connection.dialect.name == "postgresql":
        seconds = connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
        return LeaseTime(float(seconds), "postgresql")
    if hasattr(time, "CLOCK_BOOTTIME") and _BOOT_ID.exists():
        return LeaseTime(time.clock_gettime(time.CLOCK_BOOTTIME), _BOOT_ID.read_text().strip())
    return LeaseTime(time.time(), "wall")
