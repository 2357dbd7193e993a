"""Two models compared on the same images, one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
