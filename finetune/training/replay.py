"""Train on cached activations: the input of the first trainable stage is read from disk instead of computed again in each epoch.

The batches have the same order as batches of images. A run on cached views therefore trains like one that computes the same views
again, except for the rounding of the cache's number format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.data.dataset import Sample
from finetune.data.loader import Batch
from finetune.data.order import epoch_order, steps_per_epoch, times_before
from finetune.errors import DiskFull
from finetune.events import CacheFormat, CacheFull
from finetune.features.cache import Rows
from finetune.features.prefix import ClassifierPrefix
from finetune.features.rows import DoesNotFit, FeatureContext, FrozenRows, RowType, Views
from finetune.model.classifier import Classifier
from finetune.model.cut import cut_at
from finetune.training.machine import Numerics


@dataclass(frozen=True)
class Activations:
    """The input of the first trainable stage for every image and view. It is memory-mapped, so only batches are in memory."""

    stage: int  # the cut is before this stage
    rows: Rows  # view k of image i is row i * views + k
    views: int

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows) // self.views

    def train_batches(
        self, batch_size: int, seed: int, classes: NDArray[np.int64] | None = None
    ) -> Callable[[int, int], Iterator[Batch]]:
        """Return the training batches for `fit`, in the order of `TrainLoader`. Image i has view (i + epoch) mod `views`.

        Args:
            classes: (N,) class of each image, to sample every class equally often; an image that is repeated within an epoch has
                its next view.
        """

        def batches(epoch: int, start_step: int) -> Iterator[Batch]:
            order = epoch_order(len(self), seed, epoch, classes)
            times = times_before(order)
            for step in range(start_step, steps_per_epoch(len(self), batch_size)):
                part = slice(step * batch_size, (step + 1) * batch_size)
                yield self._batch(order[part], (order[part] + epoch + times[part]) % self.views)

        return batches

    def eval_batches(self, batch_size: int, images: NDArray[np.int64] | None = None) -> EvalBatches:
        """Return batches of every image once, in order, in its first view, which is not augmented.

        Args:
            images: positions of the images to return; the indices of the batches then are positions in this array.
        """
        return EvalBatches(self, batch_size, np.arange(len(self)) if images is None else images)

    def _batch(self, images: NDArray[np.int64], view: NDArray[np.int64]) -> Batch:
        return Batch(self.rows.take(images * self.views + view), images)


@dataclass(frozen=True)
class EvalBatches:
    """Batches for evaluation, which can be iterated any number of times."""

    activations: Activations
    batch_size: int
    images: NDArray[np.int64]

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.images), self.batch_size):
            images = self.images[start : start + self.batch_size]
            rows = self.activations._batch(images, np.zeros_like(images)).images
            yield Batch(rows, np.arange(start, start + len(images)))


def prepare_activation(classifier: Classifier, activation: Tensor, numerics: Numerics) -> Tensor:
    """Return cached activations as float32, in the memory layout of the weights; for `fit(prepare=…)`."""
    layout = torch.channels_last if numerics.channels_last and activation.ndim == 4 else torch.contiguous_format
    return activation.float().contiguous(memory_format=layout)


class ForwardFrom:
    """Compute logits (B, C) from the activations before `stage`, with the rest of the classifier; for `fit(forward=…)`."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self._suffixes: dict[int, Callable[[Tensor], Tensor]] = {}

    def __call__(self, classifier: Classifier, activation: Tensor) -> Tensor:
        if id(classifier) not in self._suffixes:
            self._suffixes[id(classifier)] = cut_at(classifier, self.stage).suffix
        return self._suffixes[id(classifier)](activation)


def cached_activations(
    classifier: Classifier, stage: int, samples: Sequence[Sample], views: Views, context: FeatureContext
) -> Activations | None:
    """Return the activations before `stage` for every image and view; None, with an event, if the disk has no room for them.

    Raises:
        DataError: some images cannot be decoded; the error names each.
    """
    try:
        try:
            return _activations(classifier, stage, "float16", samples, views, context)
        except DoesNotFit:
            context.event(CacheFormat("some activations are too large for float16, so they are kept as float32"))
            return _activations(classifier, stage, "float32", samples, views, context)
    except _NoRoom as error:
        context.event(CacheFull(f"the frozen part runs again in every epoch: {error}"))
    except DiskFull as error:
        context.event(CacheFull(f"the frozen part runs again in every epoch: {error.message}"))
    return None


class _NoRoom(Exception):
    """The activations do not fit into the cache."""


def _activations(
    classifier: Classifier, stage: int, dtype: RowType, samples: Sequence[Sample], views: Views, context: FeatureContext
) -> Activations:
    """Compute the missing activations into the cache, and return all of them.

    Raises:
        _NoRoom: they do not fit into the cache.
    """
    wanted = FrozenRows(ClassifierPrefix(classifier, stage), dtype, samples, views, context)
    wanted.choose_engine()
    if wanted.n_missing:
        if not wanted.make_room():
            raise _NoRoom(wanted.why_no_room())
        wanted.compute(None, keep=True)
        wanted.look_up()
    if wanted.n_missing:
        raise _NoRoom("other processes took the room in the cache")
    context.spent(wanted.rows.seconds)
    return Activations(stage, wanted.rows, views.count)
