"""Split conformal prediction: sets of labels that hold the right one with a chosen probability, whatever the model.

The score of an image is one minus the probability that the model gave to its right label (least ambiguous set-valued classifiers:
Sadinle, Lei & Wasserman 2019, JASA 114, arXiv:1609.00451). Of n held-out scores the threshold for coverage c is the one of rank
``ceil((n + 1) c)``. For a new image from the same source, the set of all labels whose score does not exceed it holds the right
label with a probability of at least c, and at most ``c + 1 / (n + 1)`` where no two scores are equal (Vovk, Gammerman & Shafer
2005; Angelopoulos & Bates 2023, arXiv:2107.07511). That probability is over new images and over the held-out sample; it is not
promised for each class. With a threshold of its own for each class it is (Vovk 2012, arXiv:1209.2673), with larger sets.
"""

from __future__ import annotations

import math

import numpy as np

from finetune.metrics.rows import Floats, Integers


def conformal_quantile(scores: Floats, level: float) -> float | None:
    """Return the value that a new score does not exceed with probability `level`; None where the scores are too few to tell.

    Args:
        scores: (N,) of held-out images, exchangeable with the new one.
        level: above 0 and below 1.
    """
    rank = conformal_rank(len(scores), level)
    return None if rank > len(scores) else float(np.partition(scores, rank - 1)[rank - 1])


def conformal_rank(n: int, level: float) -> int:
    """Return which of n scores, counted from 1 and the smallest first, is the quantile; more than n where n are too few.

    A product that is a whole number up to rounding counts as one: level 0.9 of 9 scores is rank 9.
    """
    return max(1, math.ceil((n + 1) * level - 1e-9))


def coverage_threshold(true_probs: Floats, coverage: float) -> float | None:
    """Return the probability from which on a label belongs to the set; None where the images are too few for that coverage.

    Args:
        true_probs: (N,) probability of each held-out image's right label.
    """
    quantile = conformal_quantile(-true_probs, coverage)
    return None if quantile is None else -quantile


def class_thresholds(true_probs: Floats, targets: Integers, n_classes: int, coverage: float) -> list[float | None]:
    """Return `coverage_threshold` for each class, of its own images alone."""
    return [coverage_threshold(true_probs[targets == label], coverage) for label in range(n_classes)]
