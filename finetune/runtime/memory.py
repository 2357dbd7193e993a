"""The memory of this machine, a limit on that of a process, and which errors mean that there was not enough."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import OutOfMemory

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # mallopt(3)
_LARGE_BYTES = 1 << 20  # at 128 KiB, glibc's first value, predictions take a tenth longer; at 1 MiB no longer than without
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


def limit_free_memory(n_arenas: int) -> None:
    """Have glibc allocate from few arenas, by default 8 a core, and map large blocks, which are returned when they are freed.

    Each arena keeps pages that its threads have freed; a server with many threads holds a multiple of what it uses then. Without
    a fixed size glibc takes blocks of up to 32 MiB from the arenas once blocks of that size were freed, and what small objects
    leave between them cannot be returned.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_ARENA_MAX, n_arenas)
        libc.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)


def return_free_memory() -> None:
    """Return the free pages of all arenas to the kernel, where glibc allocates. It takes milliseconds."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


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
