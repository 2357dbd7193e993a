"""The figures of a cross-validation: each fold's metrics, the pooled evaluation of all folds, and an interval for each.

The two intervals answer different questions.

- The headline interval of the pooled evaluation is Wilson's (1927): every image was predicted once, by a model that was not
  trained on it, and the share of correct predictions has the sampling error of that many images. It takes the models as given.
- `Spread.interval` is Student's t over the folds, for another round of training and testing. Folds share most of
  their training images, so their scores are not independent and the plain standard error is too small (Bengio & Grandvalet 2004,
  JMLR 5, show that no unbiased one exists). It is widened as Nadeau & Bengio (2003, Machine Learning 52) do for repeated
  training and testing: the variance of the mean is s² (1/k + n_test/n_train) instead of s²/k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetune.evaluation.evaluate import POOLED, UNSEEN, Evaluation
from finetune.tasks import task_named


@dataclass(frozen=True)
class FoldScore:
    """One fold: its numbers of images, its metrics and its cost."""

    fold: int  # from 1
    n_train: int  # images the final model was fitted on; includes the validation images if it was refitted on them
    n_test: int
    metrics: Mapping[str, float]  # val/… from the images that the epoch was chosen on, test/… from those held out
    summary: str
    seconds: float
    mlflow_run_id: str | None = None

    def held_out(self, name: str) -> float:
        """Return a metric of the images held out, without near duplicates of the fold's training images if there are some."""
        return self.metrics.get(f"test{UNSEEN}/{name}", self.metrics[f"test/{name}"])

    @property
    def n_held_out(self) -> int:
        """The number of images that `held_out` counts."""
        return int(self.metrics.get(f"test{UNSEEN}/n", self.n_test))

    @property
    def has_copies(self) -> bool:
        """Whether images held out are near duplicates of the fold's training images."""
        return f"test{UNSEEN}/n" in self.metrics


@dataclass(frozen=True)
class Spread:
    """Mean, spread and 95 % interval of one metric over the folds; the module's docstring describes the interval."""

    mean: float
    standard_deviation: float  # over the folds, with denominator k - 1
    interval: tuple[float, float]


@dataclass(frozen=True)
class CrossValidation:
    """The results of all folds, which estimate the performance of a model trained in the same way on all images.

    Near duplicates of a fold's training images count in the pooled evaluation, but not in the metrics of the folds.
    """

    folds: tuple[FoldScore, ...]
    pooled: Evaluation

    @property
    def has_copies(self) -> bool:
        """Whether some images held out are near duplicates of their fold's training images."""
        return any(fold.has_copies for fold in self.folds)

    @property
    def spreads(self) -> dict[str, Spread]:
        """Map each metric key, without its split, to its spread over the folds' held-out images."""
        ratio = sum(fold.n_test for fold in self.folds) / sum(fold.n_train for fold in self.folds)
        return {
            metric.key: spread([fold.held_out(metric.key) for fold in self.folds], test_to_train=ratio, largest=metric.largest)
            for metric in task_named(self.pooled.task).metrics
        }

    @property
    def metrics(self) -> dict[str, float]:
        """The pooled metrics as ``cv/name``, with mean and standard deviation over folds as ``cv/name_mean``, ``cv/name_sd``."""
        values = self.pooled.metrics(POOLED)
        for name, found in self.spreads.items():
            values |= {f"{POOLED}/{name}_mean": found.mean, f"{POOLED}/{name}_sd": found.standard_deviation}
        return values

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values. The complete pooled evaluation is in ``evaluation.json``."""
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
    """Return mean, standard deviation and interval over at least two folds of a metric that lies between 0 and `largest`.

    Args:
        test_to_train: number of a fold's test images divided by the number of its training images.
    """
    from scipy.special import stdtrit  # importing it takes a third of a second, which runs without folds do not need

    k = len(values)
    mean = math.fsum(values) / k
    variance = math.fsum((value - mean) ** 2 for value in values) / (k - 1)
    half = float(stdtrit(k - 1, 0.975)) * math.sqrt(variance * (1 / k + test_to_train))
    return Spread(mean, math.sqrt(variance), (max(0.0, mean - half), min(largest, mean + half)))
