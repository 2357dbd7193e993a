"""Load batches of uint8 pixels, decoded and preprocessed in background threads.

The contents of a batch are a pure function of (seed, epoch, step). So a run that resumes at any step gets the same batches as an
uninterrupted one, with any number of threads, and the loader has no state to save. An image that cannot be decoded stops the loop
with an `ImageError` that names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from finetune.bundle.image import decode_image
from finetune.bundle.preprocess import Preprocess
from finetune.data.augment import Augment, sample_seed
from finetune.data.dataset import Sample
from finetune.data.order import epoch_order, steps_per_epoch, times_before
from finetune.data.parallel import ordered_map
from finetune.data.pixels import PixelStore

REPEATED_EPOCHS = 1 << 20  # is added to the epoch for a sample that is repeated within it, so that its views are new ones


class Batch(NamedTuple):
    images: np.ndarray  # (B, h, w, 3) uint8
    indices: np.ndarray  # (B,) int64, positions in the samples that the loader was given


@dataclass(frozen=True)
class EvalLoader:
    """Yields every sample once, in order, preprocessed as in serving. It can be iterated several times."""

    samples: Sequence[Sample]
    preprocess: Preprocess
    batch_size: int = 32
    threads: int = 1
    pixels: PixelStore | None = None  # where large photographs are kept decoded, if this will be iterated again

    def __len__(self) -> int:
        return math.ceil(len(self.samples) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = np.arange(len(self.samples), dtype=np.int64)
        return load_batches(order, self._image, self.batch_size, self.threads)

    def _image(self, index: int) -> np.ndarray:
        sample = self.samples[index]
        if self.pixels is None:
            return sample.decode(self.preprocess.load)
        return self.preprocess(self.pixels.read(sample, self.preprocess.decode_short_side_px))


@dataclass(frozen=True)
class TrainLoader:
    """Yields the batches of one epoch, shuffled and augmented, from `start_step` (counted within the epoch) on."""

    samples: Sequence[Sample]
    augment: Augment
    batch_size: int
    seed: int
    epoch: int = 0
    start_step: int = 0
    threads: int = 1
    pixels: PixelStore | None = None  # where large photographs are kept decoded for the next epoch
    classes: np.ndarray | None = None  # (N,) of the samples, to be seen equally often; see `epoch_order`

    def __len__(self) -> int:
        """Return the number of steps that are left of the epoch."""
        return max(0, steps_per_epoch(len(self.samples), self.batch_size) - self.start_step)

    def __iter__(self) -> Iterator[Batch]:
        order, times = self.positions()
        return load_batches(order, lambda place: self._view(int(order[place]), int(times[place])), self.batch_size, self.threads)

    def positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the index of each sample in the rest of the epoch, and how often that sample came earlier in the epoch."""
        order = epoch_order(len(self.samples), self.seed, self.epoch, self.classes)
        part = slice(self.start_step * self.batch_size, (self.start_step + len(self)) * self.batch_size)
        return order[part], times_before(order)[part]

    def batch(self, indices: np.ndarray, times: np.ndarray) -> Batch:
        """Return the batch of some positions of this epoch, loaded in the calling thread."""
        return Batch(np.stack([self._view(int(index), int(time)) for index, time in zip(indices, times, strict=True)]), indices)

    def _view(self, index: int, time: int) -> np.ndarray:
        sample, short_side_px = self.samples[index], self.augment.decode_short_side_px
        if self.pixels is None:
            rgb = sample.decode(lambda data: decode_image(data, short_side_px=short_side_px))
        else:
            rgb = self.pixels.read(sample, short_side_px)
        return self.augment(rgb, sample_seed(self.seed, self.epoch + time * REPEATED_EPOCHS, index))


def load_batches(order: np.ndarray, load: Callable[[int], np.ndarray], batch_size: int, threads: int) -> Iterator[Batch]:
    """Yield batches of ``load(place)`` for the places in `order`, which contains the indices.

    About two batches of images are loaded in advance.
    """
    ahead = max(2 * threads, min(2 * batch_size, 256))
    with closing(ordered_map(load, range(len(order)), threads=threads, ahead=ahead)) as images:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield Batch(np.stack([next(images) for _ in indices]), indices)
