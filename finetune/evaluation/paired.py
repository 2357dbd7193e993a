"""Two models compared on the same images, one by one. NumPy alone, so that a server can do it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune.errors import InvalidInput
from finetune.evaluation.predictions import Predictions
from finetune.tasks import task_named


@dataclass(frozen=True)
class Gain:
    """How much higher one model's headline metric is than another's, on the same images."""

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
    """Return the mean over images of the first model's score minus the other's, with the standard error of that mean.

    The standard error is at least what one image that differs would give.

    Raises:
        InvalidInput: the two tables are not of the same images.
    """
    if first.ids != than.ids:
        raise InvalidInput("only answers to the same images can be compared one by one")
    task = task_named(first.task)
    scores = [task.judge(table.logits, table.labels).score for table in (first, than)]
    differences = scores[0] - scores[1]
    n = len(differences)
    gain = math.fsum(differences) / n
    variance = max(math.fsum(differences**2) - n * gain**2, 1.0)
    return Gain(gain, math.sqrt(variance) / n, task.headline.key)


@dataclass(frozen=True)
class Paired:
    """Two models on the images that both answered and neither had seen."""

    metric: str  # key of the headline metric
    n: int
    first: float  # its mean over these images
    second: float
    only_first: int  # images that the first alone answers rightly
    only_second: int
    p_value: float  # that a difference as large arises by chance where there is none (McNemar, mid-p)
    left_out: int  # images that both answered and one of them had seen


def compare_two(first: Predictions, second: Predictions, seen: Callable[[str], bool]) -> Paired | None:
    """Compare two models on the images that both answered; None where no image is left.

    Images are paired by the sha256 of their bytes, classes by name. Where the labels differ, those of `first` count.

    Args:
        seen: whether one of the models was trained or chosen on the image with this sha256.

    Raises:
        InvalidInput: the models know other classes, or have another task.
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
    scores = task.judge(answers.logits, answers.labels).score
    other_scores = task.judge(others.logits[:, columns], answers.labels).score
    only_first, only_second = (int((one > other).sum()) for one, other in ((scores, other_scores), (other_scores, scores)))
    return Paired(
        metric=task.headline.key,
        n=len(kept),
        first=float(np.mean(scores)),
        second=float(np.mean(other_scores)),
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar_mid_p(only_first, only_second),
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
    """Return the probabilities of 0 to `most` heads in `n` throws of a fair coin."""
    steps = np.arange(1, most + 1, dtype=np.float64)
    logs = np.concatenate([[0.0], np.cumsum(np.log(n - steps + 1) - np.log(steps))]) - n * math.log(2)
    return np.exp(logs)
