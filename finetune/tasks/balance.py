"""Class imbalance: weights of classes in the loss, or logits adjusted by the class frequencies.

The definition is the same for every method: a solved head and training by gradient steps minimise the same weighted or adjusted
loss. In a single-label task a weight applies to all images of the class; in a multi-label task it applies to the loss term of the
label on the images that have it. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune.errors import InvalidInput

ClassWeights = Literal["none", "balanced", "effective_number", "sampling"]

EFFECTIVE_BETA = 0.999  # Cui et al. 2019; the effective number of 1,000 images is then about 630


@dataclass(frozen=True, eq=False)
class Balance:
    """How the loss treats class imbalance; by default not at all.

    Args:
        weights: (C,) of the loss. Single-label: of an image by its class, with mean one over the training images. Multi-label:
            of the label's loss term on the images that have the label; the weight on all other images is one.
        offsets: (C,) added to the logits in the loss only (logit adjustment: Menon et al. 2021), so that the model does not learn
            the class frequencies; they are subtracted from the bias of a solved head, which is equivalent.
        of_images: (N,) the weight of each training image by its class; None: all are 1, as where `weights` are of single labels.
        sampled: training steps draw all classes equally often, so their loss has no weights; `weights` apply to the solved head.
    """

    weights: NDArray[np.float64] | None = None
    offsets: NDArray[np.float64] | None = None
    sampled: bool = False
    of_images: NDArray[np.float64] | None = None

    @property
    def of_steps(self) -> Balance:
        """The balance that applies to the loss of training steps."""
        return replace(self, weights=None, of_images=None) if self.sampled else self


def balance_of(labels: NDArray[np.integer[Any]], n_classes: int, class_weights: ClassWeights, logit_adjustment: float) -> Balance:
    """Return the balance of single-label training data.

    Args:
        labels: (N,) class indices.
        logit_adjustment: strength of the adjustment; 0 is none, 1 is optimal for the mean recall over classes.
    """
    counts = np.bincount(labels, minlength=n_classes).astype(np.float64)
    offsets = None
    if logit_adjustment > 0:
        offsets = logit_adjustment * np.log(np.maximum(counts, 0.5) / counts.sum())
    if class_weights == "none":
        return Balance(None, offsets)
    worth = counts if class_weights in ("balanced", "sampling") else (1 - EFFECTIVE_BETA**counts) / (1 - EFFECTIVE_BETA)
    weights = np.divide(1.0, worth, out=np.zeros_like(counts), where=counts > 0)
    weights *= counts.sum() / float((weights * counts).sum())
    return Balance(weights, offsets, class_weights == "sampling", weights[labels])


def balance_of_labels(targets: NDArray[Any], class_weights: ClassWeights, logit_adjustment: float) -> Balance:
    """Return the balance of multi-label training data, with targets (N, C), 1 where a label applies.

    ``balanced`` gives the images with a label the same total weight as those without it. ``effective_number`` uses the ratio of
    the effective numbers of images (Cui et al. 2019), which is smaller for rare labels. The weight of a label that all images or
    none have is one.

    Raises:
        InvalidInput: `class_weights` is ``sampling``, which is not possible with several labels per image.

    Args:
        logit_adjustment: strength with which the log-odds of a label's frequency are subtracted from its logit.
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
