"""Turn SIGINT and SIGTERM into a flag that the training loop reads between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has stopped. The training loop writes a checkpoint before it raises this to its caller."""


class StopRequest:
    """A flag that the first signal sets; a second signal raises `KeyboardInterrupt` at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def receiving_signals(self) -> Iterator[None]:
        """Receive signals during the block. Python delivers signals to the main thread only; in others the flag is never set."""
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
        """Raise an error if a signal has arrived.

        Raises:
            Interrupted: a signal has arrived.
        """
        if self.received is not None:
            raise Interrupted(f"stopped by {self.received.name}")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
