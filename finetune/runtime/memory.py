"""The memory of this machine, a limit on that of a process, and which errors mean that there was not enough."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import OutOfMemory

_TORCH_ERROR = "OutOfMemoryError"  # torch's, which is not imported here
MEMORY_QUOTA = Path("/sys/fs/cgroup/memory.max")

# PyTorch, ONNX Runtime and the C++ library report it as general errors with such a text.
_MESSAGES = (
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate",
    "bad allocation",
    "bad_alloc",
    "out of memory",
)


def available_memory(quota: Path = MEMORY_QUOTA) -> int:
    """Return the bytes of memory that this machine has, or that its container may use."""
    n_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = quota.read_text().strip()
    except OSError:
        return n_bytes
    return min(n_bytes, int(limit)) if limit.isdecimal() else n_bytes


def limit_memory(n_bytes: int) -> None:
    """Limit the memory that this process can allocate for data.

    Unlike a limit of the address space, this does not count what libraries reserve and never use.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one that led to it, means that memory could not be allocated."""
    return any(
        isinstance(one, MemoryError) or type(one).__name__ == _TORCH_ERROR or says_out_of_memory(str(one))
        for one in _chain(error)
    )


def says_out_of_memory(text: str) -> bool:
    """Return whether the text of an error means that memory could not be allocated."""
    return any(message in text.lower() for message in _MESSAGES)


@contextlib.contextmanager
def memory_errors_named(message: str) -> Iterator[None]:
    """Raise `OutOfMemory` with this message instead of an error in the block that means that there was not enough memory."""
    try:
        yield
    except Exception as error:
        if ran_out_of_memory(error):
            raise OutOfMemory(message) from error
        raise


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [cause for cause in (one.__cause__, one.__context__) if cause is not None]
