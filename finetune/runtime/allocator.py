"""Tell glibc's allocator what to do with freed memory. With other C libraries the functions here do nothing.

Training and serving need opposite settings: `retaining_memory` keeps freed memory for the next training step, and
`limit_free_memory` and `return_free_memory` give it back to the kernel, because a server is idle most of the time.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt(3): parameter numbers, and glibc's default values
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _TOP_PAD: 128 * 1024, _MMAP_MAX: 65536}
_RETAINING = {_TRIM_THRESHOLD: -1, _TOP_PAD: 64 * 1024 * 1024, _MMAP_MAX: 0}  # never trim, grow in large pieces, never map

_LARGE_BYTES = 1 << 20  # at 128 KiB, glibc's first value, predictions take a tenth longer; at 1 MiB no longer than without


@contextmanager
def retaining_memory() -> Iterator[None]:
    """Keep freed memory in the process during the block, and return free memory to the kernel afterwards.

    glibc maps blocks above 32 MiB anew each time and unmaps them when they are freed. Every training step on a CPU allocates and
    frees the same gigabytes of activations, so the kernel clears the same pages again and again: for the default backbone at
    batch size 32 that took 770,000 page faults and a third of the time of each step. The cost is a peak memory that is up to 40 %
    higher, because freed blocks are reused less tightly.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    _set(libc, _RETAINING)
    try:
        yield
    finally:
        _set(libc, _DEFAULTS)
        libc.malloc_trim(0)


def limit_free_memory(n_arenas: int) -> None:
    """Limit the number of glibc's arenas, by default 8 a core, and have large blocks mapped, which are returned when freed.

    Each arena keeps pages that its threads have freed; a server with many threads holds a multiple of what it uses then. Without
    a fixed size, glibc takes blocks of up to 32 MiB from the arenas once blocks of that size were freed, and small objects that
    lie between them keep the memory from being returned.
    """
    if (libc := _glibc()) is not None:
        _set(libc, {_ARENA_MAX: n_arenas, _MMAP_THRESHOLD: _LARGE_BYTES})


def return_free_memory() -> None:
    """Return the free pages of all arenas to the kernel. It takes milliseconds."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def _set(libc: ctypes.CDLL, values: dict[int, int]) -> None:
    for parameter, value in values.items():
        libc.mallopt(parameter, value)
