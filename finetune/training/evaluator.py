"""Evaluate the weights of a classifier while it trains: on the validation images and on a sample of the training images."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.data.loader import Batch
from finetune.model.classifier import Classifier
from finetune.tasks import Task
from finetune.training.activity import measuring_activity
from finetune.training.interrupt import StopRequest
from finetune.training.machine import Numerics, to_device
from finetune.training.objectives import Objective
from finetune.training.sample import TrainSample
from finetune.training.state import improves, measured

Prepare = Callable[[Classifier, Tensor, Numerics], Tensor]  # a batch's array on the device -> the input of the forward pass
Forward = Callable[[Classifier, Tensor], Tensor]  # -> logits (B, C)


def forward_images(classifier: Classifier, images: Tensor) -> Tensor:
    """Return the logits (B, C) of normalised images (B, 3, h, w); the default of `fit(forward=…)`."""
    logits: Tensor = classifier(images)
    return logits


@dataclass(frozen=True)
class Targets:
    """The targets of the images, with the task's metrics and the objective that use them."""

    task: Task
    objective: Objective
    train: NDArray[Any]
    val: NDArray[Any]
    train_weights: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Evaluator:
    """Predicts with a classifier that is being trained, in float32 like the exported model.

    Args:
        prepare, forward: compute logits from a batch.
        stop: is checked before each batch.
    """

    classifier: Classifier
    targets: Targets
    prepare: Prepare
    forward: Forward
    numerics: Numerics
    stop: StopRequest

    def inputs(self, batch: Batch) -> Tensor:
        """Return the input of the forward pass for a batch.

        Raises:
            Interrupted: a signal arrived.
        """
        self.stop.check()
        return self.prepare(self.classifier, to_device(batch.images, self.numerics), self.numerics)

    @torch.no_grad()
    def evaluate(self, val: Iterable[Batch]) -> dict[str, float]:
        """Return loss and metrics on the validation images."""
        self.classifier.eval()
        logits, indices = [], []
        with closed_after(val) as batches:
            for batch in batches:
                logits.append(self._logits(batch))
                indices.append(batch.indices)
        task = self.targets.task
        rows = task.image_results(np.concatenate(logits), self.targets.val[np.concatenate(indices)])
        return measured("val", task, rows)

    @torch.no_grad()
    def evaluate_sample(self, sample: TrainSample, step: int) -> dict[str, float]:
        """Predict a sample of the training images and keep the predictions; return the metrics.

        The metrics include the shares of dead channels, which are measured on the first batch.
        """
        logits: list[np.ndarray] = []
        with closed_after(sample.batches) as batches:
            self.classifier.eval()
            for batch in batches:
                with nullcontext() if logits else measuring_activity(self.classifier) as measured_activity:
                    logits.append(self._logits(batch))
                if measured_activity is not None:
                    activity = measured_activity
        predicted = np.concatenate(logits)
        sample.keep(step, predicted)
        task = self.targets.task
        values = measured("train_sample", task, task.image_results(predicted, self.targets.train[sample.plan.indices]))
        return values | {f"train/dead_channels/{stage}": share for stage, share in activity.dead_fractions.items()}

    def improves(self, values: dict[str, float], best: dict[str, float]) -> bool:
        """Return whether `values` are better on val than `best`; see `finetune.training.state.improves`."""
        return improves(values, best, self.targets.task.headline.key)

    def _logits(self, batch: Batch) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self.forward(self.classifier, self.inputs(batch)).float().cpu().numpy()
        return logits


@contextmanager
def closed_after(batches: Iterable[Batch]) -> Iterator[Iterator[Batch]]:
    """Yield an iterator over the batches, and stop the threads that load them when the block ends."""
    iterator = iter(batches)
    try:
        yield iterator
    finally:
        if isinstance(iterator, Generator):
            iterator.close()
