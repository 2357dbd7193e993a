"""PyTorch's number of threads, set for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """Let PyTorch use this many threads inside the block.

    One is right for many small operations: several threads wait for each other in loops, and on a busy machine at great length
    (building the default backbone took 1.8 s of CPU on two threads, beside other processes, and 0.24 s on one).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
