"""Being asked to stop: SIGINT and SIGTERM become a flag that the training loop reads between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and did so after writing a checkpoint."""


class StopRequest:
    """Set by the first signal; a second one interrupts at once, wherever the program is."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def check(self) -> None:
        """
        Raises:
            Interrupted: a signal has arrived.
        """
        if self.signal is not None:
            raise Interrupted(f"stopped by {self.signal.name}")


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch the signals inside the block. Outside the main thread Python delivers none, and the request is never set."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
