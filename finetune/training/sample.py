"""Predict a fixed sample of training images at some steps as in evaluation: without augmentation, dropout or mixup.

The training metrics are measured on augmented images while the weights change, so they cannot be compared with those of another
run or of the solved head. The metrics on the sample can: it consists of the same images at every step and in every run on the
same data. The predictions are written as tables (``measurements/train-step-*.npz``) for `finetune.evaluation.diagnose`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.data.loader import Batch
from finetune.training.recipe import Recipe

SHARE_OF_TRAINING = 0.01  # of the cost of training that the sample may add
STEP_COST = 3  # cost of a training step on one image, in forward passes
SMALLEST, LARGEST = 32, 512  # images


@dataclass(frozen=True)
class SamplePlan:
    """The training images to predict, and the steps after which they are predicted; they are also predicted at the end."""

    indices: NDArray[np.int64]  # positions among the training images
    steps: frozenset[int]


@dataclass(frozen=True)
class TrainSample:
    """The sample as `finetune.training.fit` uses it: its plan, its batches, and a function that stores the logits."""

    plan: SamplePlan
    batches: Iterable[Batch]  # their ``indices`` are positions in the sample
    keep: Callable[[int, NDArray[np.float32]], object]  # called with (step, logits (m, C)) to write them


def plan_sample(recipe: Recipe, samples: Sequence[Sample], input_size_px: tuple[int, int], size: int | None = None) -> SamplePlan:
    """Choose images and steps so that predicting the sample costs about `SHARE_OF_TRAINING` of the training.

    Args:
        size: number of images, whatever they cost; None: as many as the budget allows.
    """
    ends = [epoch * recipe.steps_per_epoch for epoch in _predicted_epochs(recipe.n_epochs)]
    budget = _affordable_images(recipe, input_size_px)
    if size is None and budget < SMALLEST * (len(ends) + 1):
        ends = ends[-1:]
    steps = [0, *ends]
    wanted = size if size is not None else min(max(budget // len(steps), SMALLEST), LARGEST)
    return SamplePlan(choose_sample(samples, wanted), frozenset(steps))


def choose_sample(samples: Sequence[Sample], size: int) -> NDArray[np.int64]:
    """Return the positions of `size` images, the first by sha256; a smaller sample of the same data is part of a larger one."""
    order = sorted(range(len(samples)), key=lambda index: (samples[index].sha256, samples[index].id))
    return np.sort(np.array(order[:size], dtype=np.int64))


def _predicted_epochs(n_epochs: int) -> list[int]:
    """Return the epochs after which the sample is predicted: 1, 2, 4, 8 … and the last."""
    doubling = [2**power for power in range(n_epochs.bit_length()) if 2**power < n_epochs]
    return [*doubling, n_epochs] if n_epochs else []


def _affordable_images(recipe: Recipe, input_size_px: tuple[int, int]) -> int:
    """Return how many images may be predicted in all, considering that training images may be smaller than evaluated ones."""
    height, width = recipe.train_size_px
    relative_size = height * width / (input_size_px[0] * input_size_px[1])
    return int(SHARE_OF_TRAINING * STEP_COST * recipe.n_steps * recipe.batch_size * relative_size)
