"""Admission control: bound the work that runs and waits, by how long a new request would wait."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from finetune.errors import Overloaded

T = TypeVar("T")

MAX_WAIT_SECONDS = 1.0  # requests that would wait longer are refused at once
MAX_BATCH_WAIT_SECONDS = 20.0  # the same of batches
_FIRST_GUESS_SECONDS = 0.02
_NEWEST_WEIGHT = 0.05  # weight of the newest measurement in the moving average


class WorkQueue:
    """Runs work in a pool of `threads` threads, lets further work wait if the expected wait is short, and refuses the rest.

    For predictions one ONNX Runtime call uses one core, so more threads than cores would only slow down every response. Batches
    take turns: of all their items together at most `threads` are in the pool at a time, so that single requests wait for few.
    """

    def __init__(
        self, threads: int, max_wait_seconds: float = MAX_WAIT_SECONDS, max_batch_wait_seconds: float = MAX_BATCH_WAIT_SECONDS
    ) -> None:
        self.threads = threads
        self.max_wait_seconds = max_wait_seconds
        self.max_batch_wait_seconds = max_batch_wait_seconds
        self.taken = 0  # items that run or wait for a thread
        self.batched = 0  # items of batches that wait for their turn
        self.seconds_each = _FIRST_GUESS_SECONDS
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="work")
        self._turns = asyncio.Semaphore(threads)

    @property
    def is_busy(self) -> bool:
        """Whether all threads are in use."""
        return self.taken >= self.threads

    @property
    def has_room(self) -> bool:
        """Whether further work would start within `max_wait_seconds`."""
        return self.taken < self.threads or self.taken * self.seconds_each / self.threads <= self.max_wait_seconds

    async def run(self, work: Callable[..., T], *args: object, admitted: bool = False, n_items: int = 1) -> T:
        """Run `work` and return its result.

        Args:
            admitted: run it however long it has to wait.
            n_items: how many items, such as images, one call of `work` processes.

        Raises:
            Overloaded: it would wait too long.
        """
        if not admitted:
            self._check_room()
        self.taken += n_items
        try:
            call = functools.partial(self._timed, n_items, work, *args)
            return await asyncio.get_running_loop().run_in_executor(self._executor, call)
        finally:
            self.taken -= n_items

    async def run_batch(self, work: Callable[..., T], items: Sequence[tuple[Any, ...]]) -> list[T]:
        """Run `work` with the arguments of each item; return the results in order. Concurrent batches alternate.

        Raises:
            Overloaded: the batches before it would take too long, or single requests fill the queue. A batch is never refused if
                nothing else runs or waits.
        """
        self._check_room()
        if self.batched * self.seconds_each / self.threads > self.max_batch_wait_seconds:
            raise Overloaded(OVERLOADED.format(self.taken + self.batched))
        self.batched += len(items)
        waiting = list(enumerate(items))[::-1]
        results: dict[int, T] = {}

        async def take_turns() -> None:
            while waiting:
                async with self._turns:
                    if waiting:
                        position, item = waiting.pop()
                        self.batched -= 1
                        results[position] = await self.run(work, *item, admitted=True)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.threads, len(items))):
                    group.create_task(take_turns())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            self.batched -= len(waiting)
        return [results[position] for position in range(len(items))]

    def _check_room(self) -> None:
        if not self.has_room:
            raise Overloaded(OVERLOADED.format(self.taken + self.batched))

    def _timed(self, n_items: int, work: Callable[..., T], *args: object) -> T:
        began = time.perf_counter()
        try:
            return work(*args)
        finally:
            seconds = (time.perf_counter() - began) / n_items
            self.seconds_each += (1 - (1 - _NEWEST_WEIGHT) ** n_items) * (seconds - self.seconds_each)

    def stop(self) -> None:
        """Cancel waiting work, without waiting for running work."""
        self._executor.shutdown(wait=False, cancel_futures=True)


OVERLOADED = "the server is too busy to answer in time; requests running or waiting: {}. Try again in a moment"
