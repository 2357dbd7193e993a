"""Fit on held-out predictions how a bundle states its certainty: prediction sets, abstention thresholds and novelty detection.

Also measure how well these hold on other images, and how reliable temperature-scaled probabilities are on images that the
temperature was not fitted on. Pure functions of tables of predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.calibration import (
    CLASS_LEVELS,
    LEVELS,
    NOVEL,
    Calibration,
    CertaintyEstimator,
    CertaintyOptions,
    OperatingPoint,
)
from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.evaluation.predictions import Predictions
from finetune.evaluation.selective import operating_point
from finetune.metrics.conformal import class_thresholds, conformal_quantile, coverage_threshold
from finetune.metrics.intervals import wilson_interval
from finetune.metrics.novelty import Subspace, fit_subspace, held_out_distances, known_images
from finetune.runtime.blas import blas_threads_for
from finetune.tasks import task_named

MIN_IMAGES = 20  # fewer cannot demonstrate any of the precision levels, and hardly any coverage
MIN_IMAGES_FOR_NOVELTY = 40
N_PARTS = 5
CHECKED_COVERAGE, CHECKED_PRECISION = 0.90, 0.95
_ROUNDING = 1e-6  # the exported graph computes in float32: a score exactly at a threshold must still pass it


@dataclass(frozen=True)
class FittedCalibration:
    """The calibration that is exported with a model, and the subspace of its known embeddings for novelty detection."""

    calibration: Calibration
    subspace: Subspace | None


def fit_calibration(held_out: Predictions, temperature: float, *, embeddings_match: bool) -> FittedCalibration | None:
    """Fit coverage, abstention and novelty thresholds on held-out predictions.

    Args:
        temperature: the bundle's; logits are divided by it.
        embeddings_match: whether the embeddings in the table equal those of the exported model.

    Returns:
        None for fewer than `MIN_IMAGES` images, and for tasks whose models give no prediction sets.
    """
    task = task_named(held_out.task)
    if len(held_out) < MIN_IMAGES or task.why_no_prediction_sets:
        return None
    probs = task.probabilities(held_out.logits, temperature)
    targets = held_out.labels.astype(np.int64)
    of_true = probs[np.arange(len(targets)), targets]
    covered = {level: coverage_threshold(of_true, float(level)) for level in LEVELS}
    by_class = {level: class_thresholds(of_true, targets, len(held_out.classes), float(level)) for level in CLASS_LEVELS}
    subspace, novelty, unlike = _novelty(held_out if embeddings_match else replace(held_out, embedding=None))
    confidence = np.where(unlike, 0.0, probs.max(axis=1))  # a novel image is never answered, whatever its probability
    right = held_out.image_results().score > 0
    operating = {level: operating_point(confidence, right, float(level)) for level in LEVELS}
    return FittedCalibration(
        Calibration(
            split=held_out.split,
            n=len(held_out),
            coverage={level: _below(threshold) for level, threshold in covered.items() if threshold is not None},
            class_coverage={
                level: tuple(None if threshold is None else _below(threshold) for threshold in thresholds)
                for level, thresholds in by_class.items()
            },
            precision={
                level: OperatingPoint(_below(point.threshold), point.n_answered / len(held_out))
                for level, point in operating.items()
                if point is not None and point.threshold > 0.0
            },
            novelty=novelty,
        ),
        subspace,
    )


def _below(threshold: float) -> float:
    return threshold * (1.0 - _ROUNDING)


def _novelty(held_out: Predictions) -> tuple[Subspace | None, tuple[float, ...], NDArray[np.bool_]]:
    """Return the subspace, the distances that 1 % to 99 % of new images do not exceed, and which held-out images are novel."""
    nothing = np.zeros(len(held_out), bool)
    if held_out.embedding is None or len(held_out) < MIN_IMAGES_FOR_NOVELTY or not np.isfinite(held_out.embedding).all():
        return None, (), nothing
    rows = known_images(len(held_out))
    with blas_threads_for(held_out.embedding[rows].size):
        subspace = fit_subspace(held_out.embedding[rows])
        distances = held_out_distances(held_out.embedding[rows])
    quantiles = [conformal_quantile(distances, percent / 100) for percent in range(1, 100)]
    known = tuple(quantile for quantile in quantiles if quantile is not None)
    limit = conformal_quantile(distances, NOVEL)
    if limit is None:
        return None, (), nothing
    everywhere = subspace.distances(held_out.embedding)
    everywhere[rows] = distances
    return subspace, known, everywhere > limit


def check_calibration(fitted: FittedCalibration, others: Predictions, temperature: float) -> Calibration:
    """Return the calibration with its `checked` figures: coverage, precision and novelty rate on images it was not fitted on."""
    calibration = fitted.calibration
    estimator = CertaintyEstimator(others.classes, calibration, fitted.subspace)
    probs = task_named(others.task).probabilities(others.logits, temperature)
    truth = [others.classes[label] for label in others.labels]
    embedding = np.zeros((len(others), 1)) if others.embedding is None else others.embedding
    wanted = CertaintyOptions(
        coverage=CHECKED_COVERAGE if f"{CHECKED_COVERAGE:.2f}" in calibration.coverage else None,
        abstain=f"{CHECKED_PRECISION:.2f}" in calibration.precision,
        precision=CHECKED_PRECISION,
    )
    found = [estimator.estimate(p, e, wanted) for p, e in zip(probs, embedding, strict=True)]
    checked: dict[str, Any] = {"split": others.split, "n": len(others)}
    if wanted.coverage is not None:
        sets = [one.labels or () for one in found]
        covered = sum(label in labels for label, labels in zip(truth, sets, strict=True))
        checked["coverage"] = {
            "asked": CHECKED_COVERAGE,
            **_share(covered, len(others)),
            "mean_size": sum(map(len, sets)) / len(sets),
        }
    if wanted.abstain:
        task = task_named(others.task)
        best = [others.classes[task.ranking(row)[0]] for row in probs]
        answered = [row for row, one in enumerate(found) if not one.abstained]
        right = sum(best[row] == truth[row] for row in answered)
        checked["precision"] = {
            "asked": CHECKED_PRECISION,
            **(_share(right, len(answered)) if answered else {}),
            "answered": len(answered) / len(others),
        }
    if fitted.subspace is not None:
        unlike = fitted.subspace.distances(embedding) > calibration.novelty[round(100 * NOVEL) - 1]
        checked["unlike"] = {"asked": round(1 - NOVEL, 2), **_share(int(unlike.sum()), len(others))}
    return replace(calibration, checked=checked)


def _share(count: int, n: int) -> dict[str, float]:
    low, high = wilson_interval(count, n)
    return {"value": count / n, "low": low, "high": high}


def reliability_after(predictions: Predictions, temperature: float, *, fitted_on_these: bool) -> Evaluation:
    """Evaluate temperature-scaled predictions such that no image is scaled by a temperature that was fitted on it.

    Args:
        fitted_on_these: whether `temperature` was fitted on these images. Then they are scaled by cross-fitting: each of
            `N_PARTS` parts with a temperature fitted on the other parts.
    """
    factors = np.full(len(predictions), 1.0 / temperature)
    if fitted_on_these:
        part = np.arange(len(predictions)) % N_PARTS
        for number in range(N_PARTS):
            others = predictions.take(np.flatnonzero(part != number))
            found = task_named(predictions.task).fit_temperature(others.logits, others.labels)
            factors[part == number] = 1.0 if found.at_limit else 1.0 / found.temperature
    scaled = (predictions.logits.astype(np.float64) * factors[:, None]).astype(np.float32)
    thresholds = None if predictions.thresholds is None else (predictions.thresholds * factors[:, None]).astype(np.float32)
    return evaluate(replace(predictions, logits=scaled, thresholds=thresholds))


@dataclass(frozen=True)
class AccuracyCoverage:
    """The accuracy-coverage curve: the accuracy of the most confident answers, by the share of images answered."""

    answered: tuple[float, ...]  # share of images, ascending
    accuracy: tuple[float, ...]  # of those
    low: tuple[float, ...]  # 95 % interval
    high: tuple[float, ...]


def accuracy_coverage(predictions: Predictions, temperature: float, n_points: int = 100) -> AccuracyCoverage:
    """Return the accuracy of the n most confident answers, for at most `n_points` values of n."""
    task = task_named(predictions.task)
    confidence = task.probabilities(predictions.logits, temperature).max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    right = np.cumsum(predictions.image_results().score[order])
    counts: Sequence[int] = sorted({max(1, round(len(predictions) * place / n_points)) for place in range(1, n_points + 1)})
    intervals = [wilson_interval(int(right[count - 1]), count) for count in counts]
    return AccuracyCoverage(
        answered=tuple(count / len(predictions) for count in counts),
        accuracy=tuple(float(right[count - 1] / count) for count in counts),
        low=tuple(low for low, _ in intervals),
        high=tuple(high for _, high in intervals),
    )
