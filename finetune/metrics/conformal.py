"""Split conformal prediction: sets of labels that contain the true label with a chosen probability, for any model.

The score of an image is one minus the probability that the model gives to its true label (least ambiguous set-valued classifiers:
Sadinle, Lei & Wasserman 2019, JASA 114, arXiv:1609.00451). The threshold for coverage c is the score of rank
``ceil((n + 1) c)`` among n held-out scores. For a new image from the same distribution, the set of all labels whose score does
not exceed the threshold contains the true label with a probability of at least c, and at most ``c + 1 / (n + 1)`` if no two
scores are equal (Vovk, Gammerman & Shafer 2005; Angelopoulos & Bates 2023, arXiv:2107.07511). This holds on average over new
images and held-out samples, not for each class. A separate threshold for each class guarantees coverage for each class (Vovk
2012, arXiv:1209.2673), with larger sets.
"""

from __future__ import annotations

import math

import numpy as np

from finetune.metrics.rows import Floats, Integers


def conformal_quantile(scores: Floats, level: float) -> float | None:
    """Return the value that a new score does not exceed with probability `level`; None if there are too few scores.

    Args:
        scores: (N,) of held-out images, exchangeable with the new one.
        level: above 0 and below 1.
    """
    rank = conformal_rank(len(scores), level)
    return None if rank > len(scores) else float(np.partition(scores, rank - 1)[rank - 1])


def conformal_rank(n: int, level: float) -> int:
    """Return the rank of the quantile among n ascending scores, counted from 1; greater than n if there are too few scores.

    A product that is an integer up to floating-point error is not rounded up: level 0.9 of 9 scores has rank 9.
    """
    return max(1, math.ceil((n + 1) * level - 1e-9))


def coverage_threshold(true_probs: Floats, coverage: float) -> float | None:
    """Return the least probability of the labels in a set with this coverage; None if there are too few images for it.

    Args:
        true_probs: (N,) probability of each held-out image's true label.
    """
    quantile = conformal_quantile(-true_probs, coverage)
    return None if quantile is None else -quantile


def class_thresholds(true_probs: Floats, targets: Integers, n_classes: int, coverage: float) -> list[float | None]:
    """Return `coverage_threshold` for each class, computed from the images of that class only."""
    return [coverage_threshold(true_probs[targets == label], coverage) for label in range(n_classes)]
