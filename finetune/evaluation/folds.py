"""Cross-validation as figures: each fold's judgement, all of them pooled, and how far either may be trusted.

Two intervals are given, and they answer different questions.

- The headline interval of the pooled evaluation is Wilson's (1927): every image was labelled once, by a model that had not
  seen it, and the share of right answers has the sampling error of that many images. It takes the models as given.
- `Spread.interval` is Student's t over the folds: what another round of training and testing would give. Folds share most of
  their training images, so their scores are not independent and the plain standard error is too small (Bengio & Grandvalet 2004,
  JMLR 5, show that no unbiased one exists). It is widened as Nadeau & Bengio (2003, Machine Learning 52) do for repeated
  training and testing: the variance of the mean is s² (1/k + n_test/n_train) instead of s²/k.

Knows numbers; does not know how folds are drawn or trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetune.evaluation.evaluate import Evaluation
from finetune.tasks import task_named

POOLED = "cv"
"""The split name of the pooled evaluation: ``cv/top1`` is the share of all images labelled rightly by a model that had not seen
them."""


@dataclass(frozen=True)
class FoldScore:
    """One fold: how many images it was made with, what it came to on those that it held out, and what it had chosen."""

    fold: int  # from 1
    n_train: int  # images it was fitted on in the end, those that chose included where it was refitted
    n_test: int
    metrics: Mapping[str, float]  # val/… on which it chose, test/… on what it held out
    summary: str
    seconds: float
    mlflow_run_id: str | None = None


@dataclass(frozen=True)
class Spread:
    """One metric over the folds. `interval` is the 95 % one that the module's docstring describes."""

    mean: float
    standard_deviation: float  # of the folds, with k - 1
    interval: tuple[float, float]


@dataclass(frozen=True)
class CrossValidation:
    """What the folds came to, and what therefore to expect of a model that was made the same way on all images."""

    folds: tuple[FoldScore, ...]
    pooled: Evaluation

    @property
    def spreads(self) -> dict[str, Spread]:
        """Metric name, without its split -> its spread over the folds' held-out images."""
        ratio = sum(fold.n_test for fold in self.folds) / sum(fold.n_train for fold in self.folds)
        return {
            metric.key: spread(
                [fold.metrics[f"test/{metric.key}"] for fold in self.folds], test_to_train=ratio, largest=metric.largest
            )
            for metric in task_named(self.pooled.task).metrics
        }

    @property
    def metrics(self) -> dict[str, float]:
        """The pooled figures as ``cv/name``, and their mean and standard deviation over folds as ``cv/name_mean``, ``_sd``."""
        values = self.pooled.metrics(POOLED)
        for name, found in self.spreads.items():
            values |= {f"{POOLED}/{name}_mean": found.mean, f"{POOLED}/{name}_sd": found.standard_deviation}
        return values

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values. The pooled evaluation in full is in ``evaluation.json``."""
        return {
            "folds": [asdict(fold) for fold in self.folds],
            "pooled": {
                **self.pooled.metrics(POOLED),
                "n": self.pooled.n,
                "intervals": {f"{POOLED}/{key}": list(interval) for key, interval in self.pooled.intervals.items()},
            },
            "over_folds": {name: {**asdict(found), "interval": list(found.interval)} for name, found in self.spreads.items()},
        }


def spread(values: Sequence[float], *, test_to_train: float, largest: float = math.inf) -> Spread:
    """Return mean, standard deviation and interval of a metric that lies between 0 and `largest`, over at least two folds.

    Args:
        test_to_train: images a fold was tested on, over images it was trained on.
    """
    from scipy.special import stdtrit  # importing it takes a third of a second, which runs without folds do not need

    k = len(values)
    mean = math.fsum(values) / k
    variance = math.fsum((value - mean) ** 2 for value in values) / (k - 1)
    half = float(stdtrit(k - 1, 0.975)) * math.sqrt(variance * (1 / k + test_to_train))
    return Spread(mean, math.sqrt(variance), (max(0.0, mean - half), min(largest, mean + half)))
