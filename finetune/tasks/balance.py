"""What is done about classes of different size: weights of classes, or logits adjusted by how frequent the classes are.

One definition for every method: a solved head and training by steps minimise the same weighted or adjusted loss. What the weights
are for is the task's: those of images where classes exclude each other, those of the images that have a label where an image may
have several. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune.errors import InvalidInput

ClassWeights = Literal["none", "balanced", "effective_number", "sampling"]

EFFECTIVE_BETA = 0.999  # Cui et al. 2019; a thousand images of a class are then worth about 630


@dataclass(frozen=True, eq=False)
class Balance:
    """Nothing is done by default.

    Args:
        weights: (C,). Where classes exclude each other: of the loss of an image by its class, one on average over the training
            images. Where an image may have several labels: of the loss of the images that have the label; the others weigh one.
        offsets: (C,) added to the logits in the loss alone (Menon et al. 2021), so that the model does not learn how frequent
            classes are; a solved head has them taken off instead, which is the same.
        sampled: steps see every class equally often, so their loss is not weighted; `weights` are for the solved head.
    """

    weights: NDArray[np.float64] | None = None
    offsets: NDArray[np.float64] | None = None
    sampled: bool = False

    @property
    def of_steps(self) -> Balance:
        """What the loss of steps is balanced with."""
        return replace(self, weights=None) if self.sampled else self


def balance_of(labels: NDArray[np.integer[Any]], n_classes: int, class_weights: ClassWeights, logit_adjustment: float) -> Balance:
    """Return what is done about these training labels.

    Args:
        logit_adjustment: strength of the adjustment; 0 is none, 1 aims at the mean of the classes' recall.
    """
    counts = np.bincount(labels, minlength=n_classes).astype(np.float64)
    offsets = None
    if logit_adjustment > 0:
        offsets = logit_adjustment * np.log(np.maximum(counts, 0.5) / counts.sum())
    if class_weights == "none":
        return Balance(None, offsets)
    worth = counts if class_weights in ("balanced", "sampling") else (1 - EFFECTIVE_BETA**counts) / (1 - EFFECTIVE_BETA)
    weights = np.divide(1.0, worth, out=np.zeros_like(counts), where=counts > 0)
    return Balance(weights * (counts.sum() / float((weights * counts).sum())), offsets, class_weights == "sampling")


def balance_of_labels(targets: NDArray[Any], class_weights: ClassWeights, logit_adjustment: float) -> Balance:
    """Return what is done about training targets (N, C), 1 where a label applies.

    ``balanced`` makes the images that have a label weigh as much, all together, as those that do not; ``effective_number`` counts
    both as Cui et al. (2019) do, which is less where labels are rare. A label that no image has, or every image, weighs one.

    Raises:
        InvalidInput: sampling, which several labels of an image contradict.

    Args:
        logit_adjustment: strength with which the log-odds of a label's frequency are taken off its logit.
    """
    if class_weights == "sampling":
        raise InvalidInput("data.class_weights: sampling is for images with exactly one label; take balanced")
    positive = targets.sum(axis=0, dtype=np.float64)
    negative = len(targets) - positive
    offsets = None
    if logit_adjustment > 0:
        offsets = logit_adjustment * np.log(np.maximum(positive, 0.5) / np.maximum(negative, 0.5))
    if class_weights == "none":
        return Balance(None, offsets)
    if class_weights == "effective_number":
        positive, negative = ((1 - EFFECTIVE_BETA**count) / (1 - EFFECTIVE_BETA) for count in (positive, negative))
    learnable = (positive > 0) & (negative > 0)
    return Balance(np.divide(negative, positive, out=np.ones_like(positive), where=learnable), offsets)
