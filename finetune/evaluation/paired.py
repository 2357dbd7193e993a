"""Compare two models image by image on the same images. Needs NumPy but not SciPy, so that the server can use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import InvalidInput
from finetune.evaluation.predictions import Predictions
from finetune.metrics import Metric
from finetune.tasks import task_named

RESAMPLINGS = 2000  # of the bootstrap over images, for metrics that are not means over images
_BLOCK_ELEMENTS = 2**22  # largest size of one (resamplings, N) weight matrix, which bounds memory


@dataclass(frozen=True)
class Gain:
    """The difference of two models' headline metric on the same images, with its standard error."""

    gain: float
    standard_error: float
    metric: str

    @property
    def pays(self) -> bool:
        """Whether the gain exceeds its standard error."""
        return self.gain > self.standard_error

    def __str__(self) -> str:
        return f"{100 * self.gain:+.1f} ± {100 * self.standard_error:.1f} points of val {self.metric}"


def paired_gain(first: Predictions, than: Predictions) -> Gain:
    """Return the first model's headline metric minus that of `than`, with the standard error of the difference.

    For a metric that is not a mean over images the standard error comes from a bootstrap over images. It is never smaller than
    if exactly one image differed, so that a difference on no image does not look certain.

    Raises:
        InvalidInput: the two tables are not of the same images.
    """
    if first.ids != than.ids:
        raise InvalidInput("only answers to the same images can be compared one by one")
    task = task_named(first.task)
    results = [first.image_results(), than.image_results()]
    n = len(first)
    if task.headline is not task.mean_score:
        variance = float(np.var(resampled(results[:1], task.headline) - resampled(results[1:], task.headline)))
        gain = task.headline.compute(results[0]) - task.headline.compute(results[1])
        return Gain(gain, math.sqrt(variance + 1.0 / n**2), task.headline.key)
    differences = results[0].score - results[1].score
    gain = math.fsum(differences) / n
    variance = max(math.fsum(differences**2) - n * gain**2, 1.0)
    return Gain(gain, math.sqrt(variance) / n, task.headline.key)


def resampled(results: Sequence[Any], metric: Metric[Any], seed: int = 0) -> NDArray[np.float64]:
    """Return (RESAMPLINGS,) bootstrap values of a metric: its mean over runs for each resampling of the images.

    Two calls with the same seed and number of images draw the same resamplings, so that their differences are paired.

    Args:
        results: the image results of each run, for the same images in the same order.
    """
    n = len(results[0])
    chance, found = np.random.default_rng(seed), []
    size = max(1, min(RESAMPLINGS, _BLOCK_ELEMENTS // n))
    for start in range(0, RESAMPLINGS, size):
        weights = chance.multinomial(n, np.full(n, 1 / n), min(size, RESAMPLINGS - start)).astype(np.float64)
        found.append(np.mean([metric.weighted(rows, weights) for rows in results], axis=0))
    return np.concatenate(found)


@dataclass(frozen=True)
class Paired:
    """The comparison of two models on the images that both predicted and neither was trained or chosen on."""

    metric: str  # key of the headline metric
    n: int
    first: float  # the metric on these images
    second: float
    only_first: int  # images that only the first model answers correctly
    only_second: int
    p_value: float  # two-sided
    test: str  # name of the statistical test
    left_out: int  # images that both predicted but one of them was trained or chosen on


def compare_two(first: Predictions, second: Predictions, seen: Callable[[str], bool]) -> Paired | None:
    """Compare two models on the images that both predicted and neither has seen; None if there is no such image.

    Images are paired by the sha256 of their bytes, classes by name. Where the labels differ, those of `first` count.

    Args:
        seen: whether one of the models was trained or chosen on the image with this sha256.

    Raises:
        InvalidInput: the models have different classes or tasks.
    """
    if first.task != second.task or set(first.classes) != set(second.classes):
        raise InvalidInput("only models with the same task and classes can be compared image by image")
    rows, other_rows = ({digest: row for row, digest in enumerate(table.digests())} for table in (first, second))
    shared = sorted(set(rows) & set(other_rows) - {"00" * 32})
    kept = [digest for digest in shared if not seen(digest)]
    if not kept:
        return None
    answers = first.take([rows[digest] for digest in kept])
    columns = [second.classes.index(name) for name in first.classes]
    others = second.take([other_rows[digest] for digest in kept])
    task = task_named(first.task)
    thresholds = None if others.thresholds is None else others.thresholds[:, columns]
    results = answers.image_results()
    of_other = task.image_results(others.logits[:, columns], answers.labels, thresholds)
    scores, other_scores = results.score, of_other.score
    only_first, only_second = (int((one > other).sum()) for one, other in ((scores, other_scores), (other_scores, scores)))
    if task.headline is task.mean_score:
        test, p_value = "McNemar, mid-p", mcnemar_mid_p(only_first, only_second)
    else:
        spread = resampled([results], task.headline) - resampled([of_other], task.headline)
        error = math.sqrt(float(np.var(spread)) + 2.0 / (len(kept) + 2) ** 2)
        difference = task.headline.compute(results) - task.headline.compute(of_other)
        test, p_value = "paired bootstrap", math.erfc(abs(difference) / error / math.sqrt(2.0))
    return Paired(
        metric=task.headline.key,
        n=len(kept),
        first=task.headline.compute(results),
        second=task.headline.compute(of_other),
        only_first=only_first,
        only_second=only_second,
        p_value=p_value,
        test=test,
        left_out=len(shared) - len(kept),
    )


def mcnemar_mid_p(only_a: int, only_b: int) -> float:
    """Return McNemar's two-sided mid-p value for discordant counts (Fagerland, Lydersen & Laake 2013, equation 7)."""
    if only_a == only_b:
        return 1.0
    probabilities = _fair_binomial(only_a + only_b, min(only_a, only_b))
    return min(1.0, 2 * float(probabilities.sum()) - float(probabilities[-1]))


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Return the exact binomial two-sided p value for discordant counts."""
    if only_a == only_b:
        return 1.0
    return min(1.0, 2 * float(_fair_binomial(only_a + only_b, min(only_a, only_b)).sum()))


def _fair_binomial(n: int, most: int) -> NDArray[np.float64]:
    """Return the binomial probabilities of 0 to `most` successes in `n` trials with probability 1/2."""
    steps = np.arange(1, most + 1, dtype=np.float64)
    logs = np.concatenate([[0.0], np.cumsum(np.log(n - steps + 1) - np.log(steps))]) - n * math.log(2)
    return np.exp(logs)
