"""Metrics for images with several labels, where each label is a binary decision.

Average precision uses the ranking of images by logit, the F1 scores and the exact match use thresholds, and the losses use
probabilities. Images with equal logits share one rank, so a label with the same logit for every image has its share of positive
images as average precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import InvalidInput, TrainingError
from finetune.metrics import Interval, Metric, weighted_mean
from finetune.metrics.calibration import ECE_BINS, expected_calibration_error, reliability_bins
from finetune.metrics.intervals import Z95, wilson_interval
from finetune.metrics.rows import Floats

Booleans = NDArray[np.bool_]
Counts = NDArray[np.int64]

_ROUNDS = 400  # of the bootstrap behind an interval: its standard error is then known to 4 %
_FEWEST_ROUNDS = 100
_BUDGET = 10**8  # largest product of rounds, images and labels
_BLOCK_ELEMENTS = 2**21  # largest size of one block of the weight matrix, which bounds memory


@dataclass(frozen=True)
class LabelRows:
    """The predictions and targets of N images, label by label."""

    targets: Booleans  # (N, C) whether the image has the label
    logits: Floats  # (N, C)
    given: Booleans  # (N, C) whether the label is predicted: its logit reaches the threshold

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def n_classes(self) -> int:
        return int(self.targets.shape[1])

    @property
    def score(self) -> Floats:
        """(N,) 1 for each image whose predicted labels equal its true labels, else 0."""
        return np.asarray((self.targets == self.given).all(axis=1), np.float64)

    @cached_property
    def probs(self) -> Floats:
        return sigmoid(self.logits)

    @cached_property
    def nll(self) -> Floats:
        """(N,) binary cross entropy of each image, in nats, the mean over its labels."""
        return np.asarray(binary_cross_entropy(self.logits, self.targets).mean(axis=1))

    @cached_property
    def brier(self) -> Floats:
        """(N,) squared distance of the probabilities from 0 or 1, the mean over the labels."""
        return np.asarray(np.square(self.probs - self.targets).mean(axis=1))

    @cached_property
    def counts(self) -> tuple[Counts, Counts, Counts]:
        """For each label, (C,): the number of images that have it, that are predicted to have it, and where both hold."""
        both = self.targets & self.given
        return self.targets.sum(axis=0), self.given.sum(axis=0), both.sum(axis=0)


def label_results(
    logits: NDArray[np.floating[Any]], targets: NDArray[Any], thresholds: NDArray[np.floating[Any]] | None = None
) -> LabelRows:
    """Compare logits (N, C) with targets (N, C), 1 where a label applies.

    Args:
        thresholds: (N, C) or (C,): the least logit with which a label is given; by default 0, a probability of 1/2.

    Raises:
        InvalidInput: no image, or shapes and targets that do not fit each other.
        TrainingError: a logit is NaN or infinite.
    """
    checked = check_labels(logits, targets)
    values = logits.astype(np.float64)
    return LabelRows(checked, values, values >= (0.0 if thresholds is None else thresholds))


def check_labels(logits: NDArray[np.floating[Any]], targets: NDArray[Any]) -> Booleans:
    """Return the targets as booleans, after checking shapes, values and finiteness; raises as `label_results` does."""
    if logits.ndim != 2 or targets.shape != logits.shape:
        raise InvalidInput(
            f"cannot evaluate logits of shape {logits.shape} against targets of shape {targets.shape}: "
            "expected (images, classes) for both"
        )
    if not len(targets):
        raise InvalidInput("nothing to evaluate: the split holds no image. Give it some, or leave the split out")
    if not np.isin(targets, (0, 1)).all():
        raise InvalidInput("targets of several labels are 1 where a label applies and 0 elsewhere; these hold other values")
    bad_rows = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad_rows):
        raise TrainingError(
            f"{len(bad_rows)} of {len(targets)} images have NaN or infinite logits (first: row {bad_rows[0]}): "
            "the model diverged. Try a lower learning_rate, or float32 precision"
        )
    return targets.astype(np.bool_)


def sigmoid(logits: Floats) -> Floats:
    """Return the sigmoid of each logit, without overflow for any finite logit."""
    small = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits >= 0, 1.0, small) / (1.0 + small))


def binary_cross_entropy(logits: Floats, targets: NDArray[Any]) -> Floats:
    """Return the binary cross entropy of each label, in nats, without reduction."""
    return np.asarray(np.maximum(logits, 0.0) - logits * targets + np.log1p(np.exp(-np.abs(logits))))


# ──────────────────────────────────────────────────────────────────────────────────────────────────── average precision


def average_precisions(rows: LabelRows) -> Floats:
    """Return the average precision of each label, (C,); NaN for a label that no image has."""
    return np.asarray(_weighted_average_precisions(rows, np.ones((1, len(rows))))[0])


def mean_average_precision(rows: LabelRows) -> float:
    """Return the mean average precision over the labels with at least one image; 0 if no image has a label."""
    return float(_mean_over_labels(average_precisions(rows)[None])[0])


def weighted_mean_average_precision(rows: LabelRows, weights: Floats) -> Floats:
    blocks = (_mean_over_labels(_weighted_average_precisions(rows, block)) for block in _blocks(weights, len(rows)))
    return np.asarray(np.concatenate(list(blocks)))


def mean_average_precision_interval(rows: LabelRows) -> Interval:
    """Return the interval from the variance over resampled images (bootstrap: Efron 1979).

    The variance of two images with the opposite outcome is added, so that an interval never has width zero.
    """
    n = len(rows)
    rounds = int(np.clip(_BUDGET // (n * rows.n_classes), _FEWEST_ROUNDS, _ROUNDS))
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), rounds).astype(np.float64)
    variance = float(weighted_mean_average_precision(rows, weights).var()) + 2.0 / (n + 4) ** 2
    value, half = mean_average_precision(rows), Z95 * math.sqrt(variance)
    return max(0.0, value - half), min(1.0, value + half)


def average_precision_interval(value: float, n_positive: int) -> Interval:
    """Return the interval of one label's average precision, treated as a proportion of its positive images.

    Boyd, Eng & Page 2013 (ECML PKDD) find that such intervals have the best coverage; here Wilson's interval is used.
    """
    return wilson_interval(value * n_positive, n_positive)


def _weighted_average_precisions(rows: LabelRows, weights: Floats) -> Floats:
    """Return (B, C) average precisions of the labels under weights (B, N); NaN where no image has the label."""
    found = np.full((len(weights), rows.n_classes), np.nan)
    for label in range(rows.n_classes):
        order = np.argsort(-rows.logits[:, label], kind="stable")
        sorted_logits = rows.logits[order, label]
        ends = np.flatnonzero(np.append(sorted_logits[1:] != sorted_logits[:-1], True))  # of images with equal answers
        ordered = weights[:, order]
        n_before = np.cumsum(ordered, axis=1)[:, ends]
        right = np.cumsum(ordered * rows.targets[order, label], axis=1)[:, ends]
        total = right[:, -1]
        precision = np.divide(right, n_before, out=np.zeros_like(right), where=n_before > 0)
        gained = np.diff(right, axis=1, prepend=0.0)
        has = total > 0
        found[has, label] = (precision * gained).sum(axis=1)[has] / total[has]
    return found


def _mean_over_labels(values: Floats) -> Floats:
    """Return (B,) means of values (B, C) over the labels that are not NaN."""
    known = ~np.isnan(values)
    return np.asarray(np.where(known, values, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1))


def _blocks(weights: Floats, n: int) -> Iterator[Floats]:
    size = max(1, _BLOCK_ELEMENTS // n)
    for start in range(0, len(weights), size):
        yield weights[start : start + size]


# ────────────────────────────────────────────────────────────────────────────────────────────────────────────── decisions


def exact_match(rows: LabelRows) -> float:
    """Return the share of images whose predicted labels equal their true labels."""
    return float(np.count_nonzero(rows.score)) / len(rows)


def exact_match_interval(rows: LabelRows) -> Interval:
    return wilson_interval(int(np.count_nonzero(rows.score)), len(rows))


def weighted_exact_match(rows: LabelRows, weights: Floats) -> Floats:
    return weighted_mean(rows.score, weights)


def micro_f1(rows: LabelRows) -> float:
    """Return the F1 over all labels of all images together; 1 if there are neither true nor predicted labels."""
    true, given, both = (int(count.sum()) for count in rows.counts)
    return 2 * both / (true + given) if true + given else 1.0


def weighted_micro_f1(rows: LabelRows, weights: Floats) -> Floats:
    true, given = weights @ rows.targets.sum(axis=1), weights @ rows.given.sum(axis=1)
    both = weights @ (rows.targets & rows.given).sum(axis=1)
    return np.asarray(np.divide(2 * both, true + given, out=np.ones_like(both), where=true + given > 0))


def macro_f1(rows: LabelRows) -> float:
    """Return the mean F1 over the labels with at least one image; 0 if no image has a label."""
    scores = [2 * int(b) / (int(t) + int(g)) for t, g, b in zip(*rows.counts, strict=True) if t]
    return math.fsum(scores) / len(scores) if scores else 0.0


def weighted_macro_f1(rows: LabelRows, weights: Floats) -> Floats:
    true, given = weights @ rows.targets.astype(np.float64), weights @ rows.given.astype(np.float64)
    both = weights @ (rows.targets & rows.given).astype(np.float64)
    scores = np.divide(2 * both, true + given, out=np.zeros_like(both), where=true > 0)
    return np.asarray(scores.sum(axis=1) / np.maximum((true > 0).sum(axis=1), 1))


# ────────────────────────────────────────────────────────────────────────────────────────────────────────── probabilities


def nll(rows: LabelRows) -> float:
    """Return the mean binary cross entropy over images and labels, in nats."""
    return math.fsum(rows.nll) / len(rows)


def weighted_nll(rows: LabelRows, weights: Floats) -> Floats:
    return weighted_mean(rows.nll, weights)


def brier(rows: LabelRows) -> float:
    """Return the mean squared distance of the probabilities from 0 or 1, over images and labels (Brier 1950)."""
    return math.fsum(rows.brier) / len(rows)


def weighted_brier(rows: LabelRows, weights: Floats) -> Floats:
    return weighted_mean(rows.brier, weights)


def ece(rows: LabelRows) -> float:
    """Return the expected calibration error over all labels of all images: the mean gap of probability and frequency by bin."""
    return expected_calibration_error(reliability_bins(rows.probs.ravel(), rows.targets.ravel()))


def weighted_ece(rows: LabelRows, weights: Floats) -> Floats:
    edges = np.linspace(0.0, 1.0, ECE_BINS + 1)
    bins = np.searchsorted(edges[1:-1], rows.probs, side="left")  # (N, C)
    gaps = np.zeros((len(rows), ECE_BINS))
    np.add.at(gaps, (np.arange(len(rows))[:, None], bins), rows.targets - rows.probs)
    return np.asarray(np.abs(weights @ gaps).sum(axis=1) / (weights.sum(axis=1) * rows.n_classes))


MAP = Metric(
    "map",
    "mean average precision",
    mean_average_precision,
    weighted_mean_average_precision,
    mean_average_precision_interval,
    percent=True,
    over_classes=True,
)
MICRO_F1 = Metric("micro_f1", "micro F1", micro_f1, weighted_micro_f1)
MACRO_F1 = Metric("macro_f1", "macro F1", macro_f1, weighted_macro_f1, over_classes=True)
EXACT_MATCH = Metric("exact_match", "exact match", exact_match, weighted_exact_match, exact_match_interval, percent=True)
NLL = Metric("loss", "binary cross entropy", nll, weighted_nll, higher_is_better=False, largest=math.inf)
ECE = Metric("ece", "expected calibration error", ece, weighted_ece, higher_is_better=False)
BRIER = Metric("brier", "Brier score", brier, weighted_brier, higher_is_better=False)
