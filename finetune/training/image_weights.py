"""Weights that the data gives its images (`data.weight_column`): how much each counts in the training loss. Torch-free.

They change the loss alone, of solved heads and of steps alike. Splits, what val chooses, and every figure count each image once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.errors import DataError
from finetune.messages import natural_list, plural
from finetune.tasks.balance import Balance


@dataclass(frozen=True)
class WeightFacts:
    """The weights of the training images as the data gives them, in figures."""

    least: float
    largest: float
    n_zero: float
    effective_n: float  # Kish 1965: as many equally weighted images would make the mean as certain

    def __str__(self) -> str:
        zeros = f", {plural(int(self.n_zero), 'image')} at 0" if self.n_zero else ""
        return f"{self.least:g} to {self.largest:g}{zeros}; they count as {self.effective_n:,.0f} images of equal weight would"


def weight_facts(train: Sequence[Sample], classes: Sequence[str]) -> WeightFacts | None:
    """Return the figures of the weights of the training images; None where all are the same, which changes nothing.

    Raises:
        DataError: no training image has a weight above 0, or none of a class.
    """
    weights = np.array([sample.weight for sample in train], np.float64)
    if not len(weights):
        return None
    if not weights.any():
        raise DataError(
            f"data.weight_column: all {plural(len(weights), 'training image')} have the weight 0, so there is nothing to train "
            "with. Weights are numbers from 0 up, and some must be above 0"
        )
    learnt = {label for sample in train if sample.weight > 0 for label in sample.labels}
    ignored = sorted({label for sample in train for label in sample.labels} - learnt)
    if ignored:
        names = natural_list([classes[label] for label in ignored])
        raise DataError(
            f"data.weight_column: every training image of {names} has the weight 0, so that the model would never learn of it. "
            "Give at least one a weight above 0, or leave the class out of the data"
        )
    if (weights == weights[0]).all():
        return None
    relative = weights / weights.max()
    return WeightFacts(
        float(weights.min()), float(weights.max()), int((weights == 0).sum()), float(relative.sum() ** 2 / (relative**2).sum())
    )


def image_weights(
    train: Sequence[Sample], classes: Sequence[str], targets: NDArray[Any], balance: Balance
) -> NDArray[np.float64] | None:
    """Return the weight (N,) of each training image in the loss; None where all are the same.

    Together with the weights of their classes, where classes exclude each other, they are one on average.

    Args:
        targets: of the training images, as the task encodes them.
    """
    if weight_facts(train, classes) is None:
        return None
    weights = np.array([sample.weight for sample in train], np.float64)
    weights /= weights.max()
    of_class = 1.0 if balance.weights is None or targets.ndim > 1 else balance.weights[targets]
    return np.asarray(weights / (weights * of_class).mean())
