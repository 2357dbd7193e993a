"""The clock for leases, which adjustments of the wall clock do not affect.

With SQLite it is this machine's time since boot (including suspension), so that a step of the wall clock (NTP, an administrator)
ends no lease. The boot id is part of a lease, so that leases end when the machine restarts. With PostgreSQL it is the database
server's clock, which all workers share.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # training processes use this module without SQLAlchemy
    from sqlalchemy import Connection

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class LeaseTime(NamedTuple):
    """A time in `seconds` on the clock named `epoch`. Times of different epochs cannot be compared."""

    seconds: float
    epoch: str


def machine_time() -> LeaseTime:
    """Return the present time on this machine's clock, which all its processes share."""
    if hasattr(time, "CLOCK_BOOTTIME") and _BOOT_ID.exists():
        return LeaseTime(time.clock_gettime(time.CLOCK_BOOTTIME), _boot_id())
    return LeaseTime(time.time(), "wall")


def lease_time(connection: Connection) -> LeaseTime:
    """Return the present time on the lease clock of this database."""
    if connection.dialect.name == "postgresql":
        seconds = connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())").scalar_one()
        return LeaseTime(float(seconds), "postgresql")
    return machine_time()


@functools.cache
def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()
