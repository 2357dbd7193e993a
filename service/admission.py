"""Admission control: bound the work that runs and waits, by how long a new request would wait."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from finetune.errors import Overloaded

T = TypeVar("T")

MAX_WAIT_SECONDS = 1.0  # requests that would wait longer are refused at once
_FIRST_GUESS_SECONDS = 0.02
_FORGETTING = 0.05  # weight of the newest measurement in the moving average


class WorkQueue:
    """Runs work in a pool of `threads` threads, lets further work wait if the expected wait is short, and refuses the rest.

    For predictions one ONNX Runtime call uses one core, so more threads than cores would only slow down every response.
    """

    def __init__(self, threads: int, max_wait_seconds: float = MAX_WAIT_SECONDS) -> None:
        self.threads = threads
        self.max_wait_seconds = max_wait_seconds
        self.taken = 0  # running or waiting
        self.seconds_each = _FIRST_GUESS_SECONDS
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="work")

    @property
    def is_busy(self) -> bool:
        """Whether all threads are in use."""
        return self.taken >= self.threads

    @property
    def has_room(self) -> bool:
        """Whether further work would start within `max_wait_seconds`."""
        return self.taken < self.threads or self.taken * self.seconds_each / self.threads <= self.max_wait_seconds

    async def run(self, work: Callable[..., T], *args: object, admitted: bool = False) -> T:
        """Run `work` and return its result. Raises `Overloaded` if it would wait too long, unless it is already `admitted`."""
        if not admitted:
            self.check_room()
        self.taken += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, functools.partial(self._timed, work, *args))
        finally:
            self.taken -= 1

    def check_room(self) -> None:
        """Raise `Overloaded` if further work would wait too long."""
        if not self.has_room:
            raise Overloaded(OVERLOADED.format(self.taken))

    def _timed(self, work: Callable[..., T], *args: object) -> T:
        began = time.perf_counter()
        try:
            return work(*args)
        finally:
            self.seconds_each += _FORGETTING * (time.perf_counter() - began - self.seconds_each)

    def stop(self) -> None:
        """Cancel waiting work, without waiting for running work."""
        self._executor.shutdown(wait=False, cancel_futures=True)


OVERLOADED = "{} requests are already running or waiting. Try again in a moment"
