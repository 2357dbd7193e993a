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
    """Set by the first signal while listening; a second one interrupts at once, wherever the program is."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receive signals in the block. Outside the main thread Python delivers none: there the request is never set."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Stop here if a signal has arrived.

        Raises:
            Interrupted: one has.
        """
        if self.received is not None:
            raise Interrupted(f"stopped by {self.received.name}")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
