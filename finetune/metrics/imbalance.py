"""Classes of unequal size: when a mean over images hides the small ones, and which label of an image is the rarest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNEQUAL = 5.0  # times as many images in the largest class as in the smallest
LEAST_OF_THE_LARGEST = 20  # images; in smaller samples equal classes may differ by this factor by chance


def are_unequal(counts: Iterable[int]) -> bool:
    """Return whether, for these numbers of images by class, accuracy over all images would hide the small classes.

    Classes without an image are ignored.
    """
    present = [count for count in counts if count]
    return bool(present) and max(present) >= max(UNEQUAL * min(present), LEAST_OF_THE_LARGEST)


def rarest_label(targets: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Return the rarest label (N,) of each image, C if it has none. Folds that are stratified by it all contain rare labels."""
    n_classes = targets.shape[1]
    counts = targets.sum(axis=0, dtype=np.int64)
    masked = np.where(targets > 0, counts, np.iinfo(np.int64).max)
    return np.asarray(np.where(targets.any(axis=1), masked.argmin(axis=1), n_classes), np.int64)
