"""How many predictions run and wait at one time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

from finetune.errors import Overloaded

T = TypeVar("T")


class PredictionQueue:
    """Run `threads` predictions at once, let `waiting` more wait, and refuse the next one immediately.

    One ONNX Runtime call uses one core, so more threads than cores would only slow down every answer.
    """

    def __init__(self, threads: int, waiting: int) -> None:
        self.capacity = threads + waiting
        self.taken = 0
        self._threads = threads
        self._limiter = anyio.CapacityLimiter(threads)

    @property
    def is_busy(self) -> bool:
        """Whether every thread is taken."""
        return self.taken >= self._threads

    async def run(self, work: Callable[..., T], *args: object) -> T:
        """Return what `work` returns; raise `Overloaded` when the queue is full."""
        if self.taken >= self.capacity:
            raise Overloaded(f"{self.taken} predictions are already running or waiting. Try again in a moment")
        self.taken += 1
        try:
            return await anyio.to_thread.run_sync(functools.partial(work, *args), limiter=self._limiter)
        finally:
            self.taken -= 1
