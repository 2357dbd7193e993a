"""Map a function over items in background threads, in order and with a bounded number of results in advance. Torch-free.

Threads are used and not processes, because decoding and resampling release Python's global lock, and nothing has to be copied or
seeded for each worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` in the order of `items`; up to `ahead` items are computed in advance.

    An exception of `function` is raised when the result of its item is due. Closing the generator cancels items that have not
    begun.
    """
    if threads < 1 or ahead < 1:
        raise ValueError(f"threads and ahead must be at least 1, given {threads} and {ahead}")
    pool = ThreadPoolExecutor(threads, thread_name_prefix="images")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
