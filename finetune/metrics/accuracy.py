"""Metrics of correct predictions, as means over images (top-1, top-5) and over classes (mean recall, macro F1)."""

from __future__ import annotations

import math

import numpy as np

from finetune.metrics import Interval, Metric, weighted_mean
from finetune.metrics.intervals import interval_of_mean_of_proportions, wilson_interval
from finetune.metrics.rows import Floats, Rows

TOP_K = 5

Weights = Floats


def top1(rows: Rows) -> float:
    """Return the share of images whose most probable class is the true one."""
    return _n_correct(rows) / len(rows)


def top1_interval(rows: Rows) -> Interval:
    return wilson_interval(_n_correct(rows), len(rows))


def top5(rows: Rows) -> float:
    """Return the share of images whose true class is among the five most probable ones."""
    return float(np.count_nonzero(rows.rank < TOP_K)) / len(rows)


def top5_interval(rows: Rows) -> Interval:
    return wilson_interval(int(np.count_nonzero(rows.rank < TOP_K)), len(rows))


def mean_per_class_accuracy(rows: Rows) -> float:
    """Return the mean recall over the classes that have an image, with equal weight for each class."""
    correct, counts = np.diagonal(rows.confusion), rows.confusion.sum(axis=1)
    recalls = [int(c) / int(n) for c, n in zip(correct, counts, strict=True) if n]
    return math.fsum(recalls) / len(recalls)


def mean_per_class_accuracy_interval(rows: Rows) -> Interval:
    counts, correct = rows.confusion.sum(axis=1), np.diagonal(rows.confusion)
    return interval_of_mean_of_proportions(correct[counts > 0].tolist(), counts[counts > 0].tolist())


def macro_f1(rows: Rows) -> float:
    """Return the mean F1 over the classes that have an image."""
    true, given, correct = rows.confusion.sum(axis=1), rows.confusion.sum(axis=0), np.diagonal(rows.confusion)
    scores = [2 * int(c) / (int(t) + int(g)) for t, g, c in zip(true, given, correct, strict=True) if t]
    return math.fsum(scores) / len(scores)


def weighted_top1(rows: Rows, weights: Weights) -> Floats:
    return weighted_mean(rows.score, weights)


def weighted_top5(rows: Rows, weights: Weights) -> Floats:
    return weighted_mean(np.asarray(rows.rank < TOP_K, np.float64), weights)


def weighted_mean_per_class_accuracy(rows: Rows, weights: Weights) -> Floats:
    true, _, correct = _weighted_counts(rows, weights)
    return _mean_over_present(np.divide(correct, true, out=np.zeros_like(true), where=true > 0), true)


def weighted_macro_f1(rows: Rows, weights: Weights) -> Floats:
    true, given, correct = _weighted_counts(rows, weights)
    total = true + given
    return _mean_over_present(np.divide(2 * correct, total, out=np.zeros_like(total), where=total > 0), true)


def _weighted_counts(rows: Rows, weights: Weights) -> tuple[Floats, Floats, Floats]:
    """Return (B, C) weighted counts of the images of each class, of those predicted as it, and of those where both hold."""
    every = np.arange(len(rows))
    true, given = np.zeros((len(rows), rows.n_classes)), np.zeros((len(rows), rows.n_classes))
    true[every, rows.targets], given[every, rows.predicted] = 1.0, 1.0
    return weights @ true, weights @ given, weights @ (true * given)


def _mean_over_present(values: Floats, true: Floats) -> Floats:
    present = true > 0
    return np.asarray((values * present).sum(axis=1) / present.sum(axis=1))


def _n_correct(rows: Rows) -> int:
    return int(np.trace(rows.confusion))


TOP1 = Metric("top1", "top-1 accuracy", top1, weighted_top1, top1_interval, percent=True)
TOP5 = Metric("top5", "top-5 accuracy", top5, weighted_top5, top5_interval, percent=True, least_classes=TOP_K + 1)
MEAN_PER_CLASS_ACCURACY = Metric(
    "mean_per_class_accuracy",
    "mean per-class accuracy",
    mean_per_class_accuracy,
    weighted_mean_per_class_accuracy,
    mean_per_class_accuracy_interval,
    percent=True,
    over_classes=True,
)
MACRO_F1 = Metric("macro_f1", "macro F1", macro_f1, weighted_macro_f1, over_classes=True)
