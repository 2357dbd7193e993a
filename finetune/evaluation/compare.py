"""Compare arms (methods, backbones, settings) on the same test images: differences, intervals, tests and a verdict.

Everything is paired: arms are compared image by image. Two things vary at random: which images are in the test set, and the seed
of training. The variance of a difference is the sum of both parts (crossed random effects, conservatively: their common residual
counts twice), with Student's t for few seeds (degrees of freedom by Satterthwaite 1946). With one run per arm only the images
vary, and the conclusions hold for these trained models, not for their methods.

- Difference of the headline metric: mean over images of the difference of seed means, with Bonett & Price's (2012) adjustment for
  paired proportions, two images that disagree in opposite directions, so that an interval never has width zero.
- Test with one run per arm: McNemar's test, mid-p (Fagerland, Lydersen & Laake 2013), and the exact binomial beside it. With more
  runs: t test with the variance above. With folds: corrected resampled t test (Nadeau & Bengio 2003).
- More than one pair: Holm's (1979) adjustment of the p values.
- Other metrics (macro F1, loss, calibration), and a headline that is not a mean over images (mean average precision): paired
  bootstrap over images (Efron 1979) of the means over seeds, with the same variance from seeds. With folds such a headline is
  compared fold by fold.
- Equivalence: two one-sided tests (Schuirmann 1987) within a margin, which distinguishes "no difference found" from "no
  difference". The minimum detectable difference (at 80 % power) says how large a difference had to be to be found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq

from finetune.errors import InvalidInput
from finetune.evaluation.paired import mcnemar_exact, mcnemar_mid_p, resampled
from finetune.evaluation.predictions import Predictions
from finetune.metrics import Interval, Metric
from finetune.metrics.accuracy import MEAN_PER_CLASS_ACCURACY
from finetune.metrics.intervals import interval_of_mean_of_proportions
from finetune.tasks import task_named

ALPHA = 0.05
POWER = 0.8
DEFAULT_MARGIN = 0.01  # differences of the headline metric below this do not matter
PAIRED_METRICS = ("micro_f1", "macro_f1", "exact_match", "loss", "ece")
"""Compared by bootstrap beside the headline, where the task has them."""

Test = Literal["mcnemar mid-p", "t", "corrected resampled t", "paired bootstrap"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ArmPredictions:
    """One arm's predictions for the same images, one table per run (seed)."""

    name: str
    runs: tuple[Predictions, ...]
    folds: tuple[int, ...] | None = None  # the fold of each image, where the answers are out of fold
    n_train: int = 0  # images that the model of one fold was fitted on; only used with folds

    def __post_init__(self) -> None:
        if not self.runs:
            raise InvalidInput(f"arm {self.name!r} has no finished run to compare")


@dataclass(frozen=True)
class Difference:
    """The difference of one metric on the same images: arm `a` minus arm `b`."""

    a: str
    b: str
    metric: str
    difference: float
    low: float  # of the 95 % interval
    high: float
    standard_error: float
    degrees_of_freedom: float
    seed_share: float = 0.0  # share of the variance that comes from training seeds; the rest comes from the choice of images

    def interval(self, level: float) -> tuple[float, float]:
        """Return the confidence interval of the difference at `level`, between 0 and 1."""
        half = _t_quantile(0.5 + level / 2, self.degrees_of_freedom) * self.standard_error
        return self.difference - half, self.difference + half


@dataclass(frozen=True)
class Pair:
    """Two arms compared."""

    a: str
    b: str
    headline: Difference
    others: tuple[Difference, ...]
    p_value: float  # two-sided, before the adjustment for the number of pairs
    p_exact: float | None  # of the exact binomial test; only with one run per arm
    test: Test
    p_adjusted: float  # adjusted for the number of pairs (Holm)
    smallest_detectable: float  # the minimum detectable difference at 80 % power, given the images, runs and pairs
    n: int
    only_a: float  # images that only this arm answers correctly, mean over runs
    only_b: float
    margin: float

    @property
    def significant(self) -> bool:
        """Whether the adjusted p value is below `ALPHA`."""
        return self.p_adjusted < ALPHA

    @property
    def equivalent(self) -> bool:
        """Whether the difference lies within ± the margin by two one-sided tests, each at `ALPHA`."""
        low, high = self.headline.interval(1 - 2 * ALPHA)
        return -self.margin < low and high < self.margin

    @property
    def outcome(self) -> Literal["better", "equivalent", "undecided"]:
        """The conclusion: a significant difference, equivalence within the margin, or neither."""
        return "better" if self.significant else "equivalent" if self.equivalent else "undecided"

    @property
    def winner(self) -> str | None:
        """The name of the better arm if the difference is significant, else None."""
        if not self.significant:
            return None
        return self.a if self.headline.difference > 0 else self.b


def compare_pairs(arms: Sequence[ArmPredictions], margin: float = DEFAULT_MARGIN, seed: int = 0) -> tuple[Pair, ...]:
    """Compare every arm with every other.

    Args:
        margin: the largest difference of the headline metric that does not matter.
        seed: of the bootstrap.

    Raises:
        InvalidInput: fewer than two arms, or arms with predictions for different images.
    """
    if len(arms) < 2:
        raise InvalidInput("a comparison needs at least two arms")
    _check_same_images(arms)
    pairs = [(first, second) for index, first in enumerate(arms) for second in arms[index + 1 :]]
    found = [_compare(first, second, margin, seed, ALPHA / len(pairs)) for first, second in pairs]
    adjusted = holm([pair.p_value for pair in found])
    return tuple(replace(pair, p_adjusted=p) for pair, p in zip(found, adjusted, strict=True))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values adjusted for multiple testing by Holm's (1979) step-down method, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def smallest_detectable(difference: Difference, n: int, disagreement: float, alpha: float = ALPHA) -> float:
    """Return the true difference that a two-sided test at `alpha` finds with 80 % probability.

    Two arms that differ by d disagree on at least a share d of the images, so the variance expected at d may be larger than
    the estimated one (as in Connor's 1987 sample size for McNemar's test). The noncentral t distribution accounts for the
    uncertainty of a standard error that is estimated from few seeds.

    Args:
        n: number of images.
        disagreement: mean over images of the squared difference of the two arms' scores.
    """
    factor = _noncentrality(alpha, difference.degrees_of_freedom)
    variance = difference.standard_error**2
    found = factor * math.sqrt(variance)
    for _ in range(50):
        extra = max(0.0, (found - found**2) - disagreement) / n
        found = min(1.0, factor * math.sqrt(variance + extra))
    return found


def _noncentrality(alpha: float, df: float) -> float:
    """Return the true difference, in standard errors, that the test finds with 80 % probability."""
    if math.isinf(df) or df > 1000:
        return float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(POWER))
    critical = float(stats.t.ppf(1 - alpha / 2, df))
    return float(brentq(lambda ncp: stats.nct.sf(critical, df, ncp) - POWER, 0.0, 20.0 * critical))


def images_needed(pair: Pair, difference: float) -> int:
    """Return about how many test images would show a difference of this size with 80 % probability, ignoring seed variance."""
    if difference <= 0:
        raise ValueError("a difference of zero cannot be shown with any number of images")
    of_images = (1 - pair.headline.seed_share) * pair.smallest_detectable**2
    return math.ceil(pair.n * of_images / difference**2)


def paired_scores(arm: ArmPredictions) -> Floats:
    """Return (S, N) scores: 1 where run s answers image n correctly, else 0."""
    return np.stack([run.image_results().score for run in arm.runs])


def headline_error(arm: ArmPredictions) -> tuple[float, float]:
    """Return the standard error of an arm's headline over images and runs, and the t quantile of its 95 % interval."""
    task = task_named(arm.runs[0].task)
    n = len(arm.runs[0])
    if task.headline is task.mean_score:
        scores = paired_scores(arm)
        # Agresti & Coull's (1998) two successes and two failures, so that the interval never has width zero
        adjusted = np.concatenate([scores.mean(axis=0), [1.0, 1.0, 0.0, 0.0]])
        image_variance = float(adjusted.var()) / len(adjusted)
        means = scores.mean(axis=1)
    else:
        results = [run.image_results() for run in arm.runs]
        image_variance = float(np.var(resampled(results, task.headline))) + 2.0 / (n + 4) ** 2
        means = np.array([task.headline.compute(rows) for rows in results])
    seed_variance = float(means.var(ddof=1)) / len(means) if len(means) > 1 else 0.0
    df = _satterthwaite((image_variance, n - 1.0), (seed_variance, max(len(means) - 1.0, 1.0)))
    return math.sqrt(image_variance + seed_variance), _t_quantile(1 - ALPHA / 2, df)


def class_mean_interval(arm: ArmPredictions) -> Interval:
    """Return the 95 % interval of an arm's mean recall over classes, over images and training seeds."""
    labels = arm.runs[0].labels
    counts = np.bincount(labels)
    present = counts > 0
    right = np.stack([np.bincount(labels, weights=scores) for scores in paired_scores(arm)])[:, present]  # (S, C)
    low, high = interval_of_mean_of_proportions(right.mean(axis=0).tolist(), counts[present].tolist())
    means = (right / counts[present]).mean(axis=1)
    mean, n_runs = float(means.mean()), len(means)
    of_seeds = 0.0 if n_runs < 2 else _t_quantile(1 - ALPHA / 2, n_runs - 1) * math.sqrt(float(means.var(ddof=1)) / n_runs)
    return MEAN_PER_CLASS_ACCURACY.bounded(mean - math.hypot(mean - low, of_seeds), mean + math.hypot(high - mean, of_seeds))


def _compare(first: ArmPredictions, second: ArmPredictions, margin: float, seed: int, alpha: float) -> Pair:
    task = task_named(first.runs[0].task)
    scores_a, scores_b = paired_scores(first), paired_scores(second)
    a, b = scores_a.mean(axis=0), scores_b.mean(axis=0)
    by_image = task.headline is task.mean_score
    if by_image:
        seed_variance, seed_df = _seed_part([s.mean() for s in scores_a], [s.mean() for s in scores_b])
        headline = _headline(first, second, task.headline.key, a - b, seed_variance, seed_df)
    else:
        headline = _resampled_headline(first, second, task.headline, seed)
    # Connor's correction applies to the share of images that two arms disagree on; other metrics are not such a share.
    disagreement = float(np.square(a - b).mean()) if by_image else 1.0
    p_exact = None
    test: Test
    if first.folds is not None:
        test, p_value = "corrected resampled t", _t_p_value(headline)
    elif not by_image:
        test, p_value = "t" if len(first.runs) + len(second.runs) > 2 else "paired bootstrap", _t_p_value(headline)
    elif len(first.runs) == len(second.runs) == 1 and _is_binary(a) and _is_binary(b):
        only_a, only_b = int((a > b).sum()), int((b > a).sum())
        test, p_value, p_exact = "mcnemar mid-p", mcnemar_mid_p(only_a, only_b), mcnemar_exact(only_a, only_b)
    else:
        test, p_value = "t", _t_p_value(headline)
    return Pair(
        a=first.name,
        b=second.name,
        headline=headline,
        others=_bootstrapped(first, second, seed),
        p_value=p_value,
        p_exact=p_exact,
        test=test,
        p_adjusted=p_value,
        smallest_detectable=smallest_detectable(headline, len(a), disagreement, alpha),
        n=len(a),
        only_a=float(np.maximum(a - b, 0).sum()),
        only_b=float(np.maximum(b - a, 0).sum()),
        margin=margin,
    )


def _headline(
    first: ArmPredictions, second: ArmPredictions, metric: str, differences: Floats, seed_variance: float, seed_df: float
) -> Difference:
    """Return the difference of the headline metric, from the (N,) differences of the images' scores."""
    n = len(differences)
    mean, seed_share = float(differences.mean()), 0.0
    if first.folds is not None:
        folds = np.array(first.folds)
        means = np.array([differences[folds == fold].mean() for fold in np.unique(folds)])
        error, df = _corrected_resampled(means, n, first.n_train)
    else:
        adjusted = np.concatenate([differences, [1.0, -1.0]])
        image_variance = float(adjusted.var()) / len(adjusted)
        error = math.sqrt(image_variance + seed_variance)
        df = _satterthwaite((image_variance, n - 1.0), (seed_variance, seed_df))
        seed_share = seed_variance / (image_variance + seed_variance)
    return replace(_difference(first.name, second.name, metric, mean, error, df), seed_share=seed_share)


def _resampled_headline(first: ArmPredictions, second: ArmPredictions, metric: Metric[Any], seed: int) -> Difference:
    """Return the difference of a headline that is not a mean over images, by resampling the images or fold by fold."""
    results = [[run.image_results() for run in arm.runs] for arm in (first, second)]
    values = [[metric.compute(rows) for rows in of_arm] for of_arm in results]
    mean, seed_share = float(np.mean(values[0]) - np.mean(values[1])), 0.0
    n = len(first.runs[0])
    if first.folds is not None:
        folds = np.array(first.folds)
        parts = [folds == fold for fold in np.unique(folds)]
        of_folds = np.array([_of_fold(first, part, metric) - _of_fold(second, part, metric) for part in parts])
        error, df = _corrected_resampled(of_folds, n, first.n_train)
    else:
        seed_variance, seed_df = _seed_part(values[0], values[1])
        spread = resampled(results[0], metric, seed) - resampled(results[1], metric, seed)
        image_variance = float(np.var(spread)) + 2.0 / (n + 2) ** 2  # as if two more images disagreed in opposite directions
        error = math.sqrt(image_variance + seed_variance)
        df = _satterthwaite((image_variance, n - 1.0), (seed_variance, seed_df))
        seed_share = seed_variance / (image_variance + seed_variance)
    return replace(_difference(first.name, second.name, metric.key, mean, error, df), seed_share=seed_share)


def _of_fold(arm: ArmPredictions, inside: NDArray[np.bool_], metric: Metric[Any]) -> float:
    rows = np.flatnonzero(inside)
    return float(np.mean([metric.compute(run.take(rows).image_results()) for run in arm.runs]))


def _corrected_resampled(means: Floats, n: int, n_train: int) -> tuple[float, float]:
    """Return the standard error and degrees of freedom of the mean over folds (Nadeau & Bengio 2003, equation 9).

    Args:
        means: the difference in each fold.
        n: number of images in all folds.
        n_train: number of images that the model of one fold was fitted on.
    """
    k = len(means)
    variance = float(means.var(ddof=1)) * (1 / k + n / k / n_train)
    floor = (2.0 / (n + 2)) / (n + 2)  # as if two images had differed
    return math.sqrt(max(variance, floor)), k - 1.0


def _seed_part(values_a: Sequence[float], values_b: Sequence[float]) -> tuple[float, float]:
    """Return the variance of the difference that comes from training seeds, and its degrees of freedom.

    The runs of two arms are treated as independent: with another method the same seed gives other random numbers.
    """
    known = [(float(np.var(values, ddof=1)), len(values) - 1.0) for values in (values_a, values_b) if len(values) > 1]
    if not known:
        return 0.0, math.inf
    largest = max(known)  # used for an arm with a single run, whose own variance is unknown
    parts = []
    for values in (values_a, values_b):
        variance, df = (float(np.var(values, ddof=1)), len(values) - 1.0) if len(values) > 1 else largest
        parts.append((variance / len(values), df))
    total = math.fsum(variance for variance, _ in parts)
    return total, _satterthwaite(*parts) if total > 0 else math.inf


def _satterthwaite(*parts: tuple[float, float]) -> float:
    """Return the degrees of freedom of a sum of variances (Satterthwaite 1946), from (variance, degrees of freedom) parts."""
    total = math.fsum(variance for variance, _ in parts)
    terms = [variance**2 / df for variance, df in parts if variance > 0 and math.isfinite(df)]
    return total**2 / math.fsum(terms) if terms and math.fsum(terms) > 0 else math.inf


def _bootstrapped(first: ArmPredictions, second: ArmPredictions, seed: int) -> tuple[Difference, ...]:
    """Return the differences of `PAIRED_METRICS` other than the headline; the images' variance comes from a paired bootstrap."""
    task = task_named(first.runs[0].task)
    n = len(first.runs[0])
    results = [[run.image_results() for run in arm.runs] for arm in (first, second)]
    found = []
    for metric in (metric for metric in task.metrics if metric.key in PAIRED_METRICS and metric is not task.headline):
        values = [[metric.compute(rows) for rows in of_arm] for of_arm in results]
        image_variance = float(np.var(resampled(results[0], metric, seed) - resampled(results[1], metric, seed)))
        seed_variance, seed_df = _seed_part(values[0], values[1])
        df = _satterthwaite((image_variance, n - 1.0), (seed_variance, seed_df))
        difference = float(np.mean(values[0]) - np.mean(values[1]))
        error = math.sqrt(image_variance + seed_variance)
        found.append(_difference(first.name, second.name, metric.key, difference, error, df))
    return tuple(found)


def _difference(a: str, b: str, metric: str, value: float, error: float, df: float) -> Difference:
    half = _t_quantile(1 - ALPHA / 2, df) * error
    return Difference(a, b, metric, value, value - half, value + half, error, df)


def _t_p_value(difference: Difference) -> float:
    if difference.standard_error == 0:
        return 1.0 if difference.difference == 0 else 0.0
    t = abs(difference.difference) / difference.standard_error
    if math.isinf(difference.degrees_of_freedom):
        return 2 * float(stats.norm.sf(t))
    return 2 * float(stats.t.sf(t, difference.degrees_of_freedom))


def _t_quantile(probability: float, df: float) -> float:
    return float(stats.norm.ppf(probability)) if math.isinf(df) else float(stats.t.ppf(probability, df))


def _is_binary(scores: Floats) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _check_same_images(arms: Sequence[ArmPredictions]) -> None:
    reference = arms[0].runs[0]
    for arm in arms:
        for run in arm.runs:
            if run.ids != reference.ids or run.classes != reference.classes or run.task != reference.task:
                raise InvalidInput(
                    f"arms {arms[0].name!r} and {arm.name!r} have no predictions for the same images and classes, so they "
                    "cannot be compared image by image"
                )
