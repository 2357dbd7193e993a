"""The weights of images in the training loss, from a column of the data (`data.weight_column`). Torch-free.

They apply to the loss of solved heads and of steps. In splits, in choices on val and in all metrics, every image counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.errors import DataError
from finetune.messages import natural_list, plural
from finetune.tasks.balance import Balance


@dataclass(frozen=True)
class WeightFacts:
    """A summary of the weights of the training images."""

    least: float
    largest: float
    n_zero: float
    effective_n: float  # effective sample size (Kish 1965): number of equally weighted images with the same variance of a mean

    def __str__(self) -> str:
        zeros = f", {plural(int(self.n_zero), 'image')} at 0" if self.n_zero else ""
        return f"{self.least:g} to {self.largest:g}{zeros}; they count as {self.effective_n:,.0f} images of equal weight would"


def weight_facts(train: Sequence[Sample], classes: Sequence[str]) -> WeightFacts | None:
    """Return a summary of the weights of the training images; None if all are equal.

    Raises:
        DataError: no training image, or no training image of some class, has a weight above 0.
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


def image_weights(train: Sequence[Sample], classes: Sequence[str], balance: Balance) -> NDArray[np.float64] | None:
    """Return the weight (N,) of each training image in the loss; None if all are equal.

    Their mean is 1, after multiplication by the weights that their classes give them (`Balance.of_images`).
    """
    if weight_facts(train, classes) is None:
        return None
    weights = np.array([sample.weight for sample in train], np.float64)
    weights /= weights.max()
    of_class = 1.0 if balance.of_images is None else balance.of_images
    return np.asarray(weights / (weights * of_class).mean())
