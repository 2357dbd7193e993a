"""Measure wall and CPU seconds of this process or of one thread, and add and subtract them."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Seconds:
    """Wall and CPU seconds of a piece of work, or a reading of a clock; two readings of one clock are subtracted."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(self.wall * factor, self.cpu * factor)


def process_clock() -> Seconds:
    """Read the clock of this process; its CPU seconds are those of all threads."""
    return Seconds(time.perf_counter(), time.process_time())


def thread_clock() -> Seconds:
    """Read the clock of the calling thread."""
    return Seconds(time.perf_counter(), time.thread_time())
