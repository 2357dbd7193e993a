"""Training on cached activations: what enters the first trainable stage is read from disk instead of computed again each epoch.

The batches have the order that batches of images would have, and the rest of the network runs on them as it would have, so a run
on cached views takes the same course as one that computes these views anew, within the rounding of the cache's number format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.data.index import Sample
from finetune.data.loader import epoch_order
from finetune.errors import DiskFull
from finetune.model.classifier import Classifier
from finetune.model.cut import cut_at
from finetune.train.cache import Rows
from finetune.train.features import DEFAULT_RESOURCES, DoesNotFit, FrozenRows, Resources, RowType, Views
from finetune.train.machine import Settings


@dataclass(frozen=True)
class Activations:
    """What enters the first trainable stage, for every image and view, memory-mapped. Feeds `finetune.train.fit`."""

    stage: int  # the cut is before this stage
    rows: Rows  # view k of image i is row i * views + k
    views: int
    labels: NDArray[np.int64]

    def train_batches(self, batch_size: int, seed: int) -> CachedTrainBatches:
        return CachedTrainBatches(self, batch_size, seed)

    def eval_batches(self, batch_size: int) -> CachedEvalBatches:
        return CachedEvalBatches(self, batch_size)

    def batch(self, images: NDArray[np.integer], view: NDArray[np.integer]) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
        """Activations (B, *row_shape) and labels (B,) of one view of each of these images."""
        return self.rows.take(images * self.views + view), self.labels[images]


@dataclass(frozen=True)
class CachedTrainBatches:
    """The batches of an epoch, in the order that a loader of images would have. Image i shows view (i + epoch) mod K in it."""

    activations: Activations
    batch_size: int
    seed: int

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[NDArray[np.floating], NDArray[np.int64]]]:
        n_images = len(self.activations.labels)
        order = epoch_order(n_images, self.seed, epoch)
        for step in range(start_step, max(1, n_images // self.batch_size)):
            images = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield self.activations.batch(images, (images + epoch) % self.activations.views)


@dataclass(frozen=True)
class CachedEvalBatches:
    """Every image once, in order, as evaluation sees it."""

    activations: Activations
    batch_size: int

    def __iter__(self) -> Iterator[tuple[NDArray[np.floating], NDArray[np.int64]]]:
        for start in range(0, len(self.activations.labels), self.batch_size):
            images = np.arange(start, min(start + self.batch_size, len(self.activations.labels)))
            yield self.activations.batch(images, np.zeros_like(images))


def prepare_activation(classifier: Classifier, activation: Tensor, settings: Settings) -> Tensor:
    """Cached activations on the device -> float32, laid out as the weights are; for `fit(prepare=…)`."""
    layout = torch.channels_last if settings.channels_last and activation.ndim == 4 else torch.contiguous_format
    return activation.float().contiguous(memory_format=layout)


class ForwardFrom:
    """The part of a classifier after the cut: activations -> logits (B, C); for `fit(forward=…)`."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self._suffixes: dict[int, Callable[[Tensor], Tensor]] = {}

    def __call__(self, classifier: Classifier, activation: Tensor) -> Tensor:
        if id(classifier) not in self._suffixes:
            self._suffixes[id(classifier)] = cut_at(classifier, self.stage).suffix
        return self._suffixes[id(classifier)](activation)


def cached_activations(
    classifier: Classifier, stage: int, samples: Sequence[Sample], views: Views, resources: Resources = DEFAULT_RESOURCES
) -> Activations | None:
    """The activation before `stage` for every image and view; None, with an event that says why, where the disk has no room.

    Raises:
        DataError: images that cannot be decoded, each named.
    """
    try:
        try:
            return _activations(classifier, stage, "float16", samples, views, resources)
        except DoesNotFit:
            resources.event("cache_format", "some activations are too large for float16, so they are kept as float32")
            return _activations(classifier, stage, "float32", samples, views, resources)
    except _NoRoom as error:
        resources.event("cache_full", f"the frozen part runs again in every epoch: {error}")
    except DiskFull as error:
        resources.event("cache_full", f"the frozen part runs again in every epoch: {error.message}")
    return None


class _NoRoom(Exception):
    """The rows do not fit the cache."""


def _activations(
    classifier: Classifier, stage: int, dtype: RowType, samples: Sequence[Sample], views: Views, resources: Resources
) -> Activations:
    wanted = FrozenRows(classifier, stage, dtype, samples, views, resources)
    wanted.settle_engine()
    if wanted.n_missing:
        if not wanted.make_room():
            raise _NoRoom(wanted.why_no_room())
        wanted.compute(None, keep=True)
        wanted.look_up()
    if wanted.n_missing:
        raise _NoRoom("other processes took the room in the cache")
    labels = np.array([sample.label for sample in samples], dtype=np.int64)
    return Activations(stage, wanted.rows, views.count, labels)
