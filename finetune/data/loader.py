"""Samples → batches of uint8 pixels, decoded and framed in background threads.

What a batch holds is a pure function of position: (seed, epoch, step) decide which samples and which views, so a run
that resumes at step 1,234 sees what an uninterrupted one saw, whatever the number of threads. Nothing here is remembered,
so nothing has to be saved. An image that cannot be decoded after all stops the loop with an `ImageError` that names it.
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
from finetune.data.parallel import ordered_map
from finetune.data.pixels import PixelStore


class Batch(NamedTuple):
    images: np.ndarray  # (B, h, w, 3) uint8
    indices: np.ndarray  # (B,) int64, positions in the samples that the loader was given


@dataclass(frozen=True)
class EvalLoader:
    """Every sample once, in order, framed as in serving. May be iterated any number of times."""

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
    """The batches of one epoch, shuffled and augmented, from `start_step` (counted within the epoch) to its end."""

    samples: Sequence[Sample]
    augment: Augment
    batch_size: int
    seed: int
    epoch: int = 0
    start_step: int = 0
    threads: int = 1
    pixels: PixelStore | None = None  # where large photographs are kept decoded for the next epoch

    def __len__(self) -> int:
        """Return how many steps are left of the epoch."""
        return max(0, steps_per_epoch(len(self.samples), self.batch_size) - self.start_step)

    def __iter__(self) -> Iterator[Batch]:
        steps = steps_per_epoch(len(self.samples), self.batch_size)
        order = epoch_order(len(self.samples), self.seed, self.epoch)[self.start_step * self.batch_size : steps * self.batch_size]
        return load_batches(order, self._view, self.batch_size, self.threads)

    def _view(self, index: int) -> np.ndarray:
        sample, short_side_px = self.samples[index], self.augment.decode_short_side_px
        if self.pixels is None:
            rgb = sample.decode(lambda data: decode_image(data, short_side_px=short_side_px))
        else:
            rgb = self.pixels.read(sample, short_side_px)
        return self.augment(rgb, sample_seed(self.seed, self.epoch, index))


def steps_per_epoch(n_samples: int, batch_size: int) -> int:
    """Return the number of batches in one epoch.

    A last batch of a single image is left out: batch normalisation cannot learn from one. In the next epoch the shuffle leaves
    out another.
    """
    full, rest = divmod(n_samples, batch_size)
    return full + (rest > 1 or (rest == 1 and full == 0))


def epoch_order(n_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the samples in one epoch, (n_samples,) int64."""
    return np.random.default_rng([seed, epoch]).permutation(n_samples)


def load_batches(order: np.ndarray, load: Callable[[int], np.ndarray], batch_size: int, threads: int) -> Iterator[Batch]:
    """Yield batches of ``load(index)`` for the indices in `order`; about two batches of images are loaded ahead of the reader."""
    ahead = max(2 * threads, min(2 * batch_size, 256))
    with closing(ordered_map(load, order.tolist(), threads=threads, ahead=ahead)) as images:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield Batch(np.stack([next(images) for _ in indices]), indices)
