"""Sum the loss and the correct predictions of an epoch's training batches, and measure the images per second."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor


class EpochTotals:
    """The totals of the current epoch. They are summed on the training device, and only reading them synchronises it.

    The totals are part of a checkpoint; the speed is that of the current session.
    """

    def __init__(self, device: str) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # of losses, correct predictions, images
        self._n_timed_images = 0
        self._began_at = time.perf_counter()

    def start_timing(self) -> None:
        """Measure the speed from now on."""
        self._began_at, self._n_timed_images = time.perf_counter(), 0

    def add(self, loss: Tensor, n_correct: Tensor, n_images: int) -> None:
        """Add a batch: its mean loss and its number of correct predictions, both scalars on the device."""
        count = torch.full_like(loss, n_images, dtype=torch.float64)
        self._sums += torch.stack([loss * count, n_correct.double(), count])
        self._n_timed_images += n_images

    def sums(self) -> tuple[float, ...]:
        """Return the sum of the losses, of the correct predictions and of the images."""
        return tuple(self._sums.tolist())

    def restore(self, sums: Sequence[float]) -> None:
        """Continue from the sums in a checkpoint."""
        self._sums.copy_(torch.tensor(sums, dtype=torch.float64))

    def reset(self) -> None:
        """Begin a new epoch."""
        self._sums.zero_()

    def images_per_second(self) -> float | None:
        """Return the speed since `start_timing`; None before the first batch."""
        return self._n_timed_images / (time.perf_counter() - self._began_at) if self._n_timed_images else None
