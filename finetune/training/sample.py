"""A fixed sample of training images, answered now and then as evaluation would: without augmentation, dropout or mixup.

What training reports of itself is measured on augmented images while the weights change, so it cannot be compared with another
run's, nor with the solved head's. The sample can: it is the same images at every point and in every run on the same data. Its
answers are written as tables of predictions (``measurements/train-step-*.npz``), from which `finetune.evaluation.diagnose` works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.data.loader import Batch
from finetune.training.recipe import Recipe

SHARE_OF_TRAINING = 0.01  # that the sample may cost, in forward passes
STEP_COST = 3  # forward passes that a training step costs an image
SMALLEST, LARGEST = 32, 512  # images


@dataclass(frozen=True)
class SamplePlan:
    """Which training images are looked at, and after which steps; besides those, always where training ends."""

    indices: NDArray[np.int64]  # positions among the training images
    steps: frozenset[int]


@dataclass(frozen=True)
class TrainSample:
    """The sample as `finetune.training.fit` uses it."""

    plan: SamplePlan
    batches: Iterable[Batch]  # their ``indices`` count within the sample
    keep: Callable[[int, NDArray[np.float32]], object]  # (step, logits (m, C)) -> written down


def plan_sample(recipe: Recipe, samples: Sequence[Sample], input_size_px: tuple[int, int], size: int | None = None) -> SamplePlan:
    """Choose the images and the points so that all of it costs about a hundredth of the training.

    Args:
        size: so many images, whatever they cost.
    """
    ends = [epoch * recipe.steps_per_epoch for epoch in _looked_at(recipe.n_epochs)]
    budget = _affordable_images(recipe, input_size_px)
    if size is None and budget < SMALLEST * (len(ends) + 1):
        ends = ends[-1:]
    steps = [0, *ends]
    wanted = size if size is not None else min(max(budget // len(steps), SMALLEST), LARGEST)
    return SamplePlan(choose_sample(samples, wanted), frozenset(steps))


def choose_sample(samples: Sequence[Sample], size: int) -> NDArray[np.int64]:
    """Return the positions of `size` images. Their bytes decide, so a smaller sample of the same data is part of a larger one."""
    order = sorted(range(len(samples)), key=lambda index: (samples[index].sha256, samples[index].id))
    return np.sort(np.array(order[:size], dtype=np.int64))


def _looked_at(n_epochs: int) -> list[int]:
    """Return epochs 1, 2, 4, 8 … and the last."""
    doubling = [2**power for power in range(n_epochs.bit_length()) if 2**power < n_epochs]
    return [*doubling, n_epochs] if n_epochs else []


def _affordable_images(recipe: Recipe, input_size_px: tuple[int, int]) -> int:
    """Return how many images may be answered in all; training images may be smaller than evaluated ones."""
    height, width = recipe.train_size_px
    relative_size = height * width / (input_size_px[0] * input_size_px[1])
    return int(SHARE_OF_TRAINING * STEP_COST * recipe.n_steps * recipe.batch_size * relative_size)
