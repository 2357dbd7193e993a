"""Evaluate a split from its predictions: every metric of the task with its interval, and a table by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetune.evaluation.predictions import Predictions
from finetune.metrics import Interval, Metric
from finetune.metrics.calibration import ReliabilityBin
from finetune.metrics.intervals import wilson_interval
from finetune.metrics.temperature import Temperature
from finetune.storage.files import json_text, read_json, write_atomic
from finetune.tasks import task_named
from finetune.tasks.leading import WHY_OVER_CLASSES, leading_first

POOLED = "cv"
"""The split name of the pooled evaluation: ``cv/top1`` is the share of all images that the model of the fold that held them out
predicts correctly."""
UNSEEN = "_unseen"
"""Suffix of the second evaluation of a split that shares images with the training data: the one without those images."""
MOST_INDEPENDENT_FIRST = (f"{POOLED}{UNSEEN}", POOLED, f"test{UNSEEN}", "test", f"val{UNSEEN}", "val")
"""The splits in the order in which they are displayed. Val comes last, because the epoch was chosen on it."""


@dataclass(frozen=True)
class ClassMetrics:
    """One row of the table by class. A ratio with denominator zero is None."""

    name: str
    n: int  # images of this class
    n_predicted: int  # images given this label
    n_correct: int
    precision: float | None  # None: this label was never given
    recall: float | None  # None: no image of this class in the split
    f1: float | None  # None: no image of this class in the split
    average_precision: float | None = None  # multilabel only; None: no image of the split has this label
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # 95 %, of the ratios that are not None


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a model on one split."""

    task: str
    classes: tuple[str, ...]
    n: int
    headline: str  # key of the task's main metric
    values: Mapping[str, float]  # metric key -> value
    intervals: Mapping[str, tuple[float, float]]  # metric key -> 95 % interval, for metrics that have one
    per_class: tuple[ClassMetrics, ...]
    bins: tuple[ReliabilityBin, ...] = ()
    confusion: tuple[tuple[int, ...], ...] | None = None  # [true][predicted] counts, (C, C); None: the task has no such matrix
    class_sizes: tuple[int, ...] = ()  # images by class in all splits of the run's data; (): unknown
    facts: Mapping[str, float] = field(default_factory=dict)  # figures that are not metrics: labels per image …

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the classes without an image in this split. Means over classes leave them out."""
        return tuple(row.name for row in self.per_class if row.n == 0)

    @property
    def leading(self) -> Metric[Any]:
        """The metric that is displayed first: the mean over classes if their sizes are unequal, else the headline."""
        task = task_named(self.task)
        leading = task.leading(self.class_sizes or [row.n for row in self.per_class])
        return leading if leading.key in self.intervals else task.headline  # an evaluation of an earlier release has no interval

    @property
    def why_leading(self) -> str:
        """The reason why a metric other than the headline is displayed first; empty otherwise."""
        return "" if self.leading.key == self.headline else WHY_OVER_CLASSES

    @property
    def shown(self) -> tuple[Metric[Any], ...]:
        """The metrics that are informative for this number of classes, in the order in which they are displayed."""
        metrics = leading_first(task_named(self.task), self.leading)
        return tuple(metric for metric in metrics if len(self.classes) >= metric.least_classes)

    def metrics(self, split: str) -> dict[str, float]:
        """Return the figures under their ``split/name`` keys, with the number of images and the interval of the headline.

        If another metric is displayed first (`leading`), its interval is included too.
        """
        figures = {f"{split}/{key}": value for key, value in self.values.items()}
        bounds = {
            f"{split}/{key}_{end}": bound
            for key in dict.fromkeys((self.headline, self.leading.key))
            for end, bound in zip(("low", "high"), self.intervals[key], strict=True)
        }
        facts = {f"{split}/{name}": value for name, value in self.facts.items()}
        return {**figures, **bounds, **facts, f"{split}/n": float(self.n)}

    def confused_pairs(self, limit: int) -> list[tuple[str, str, int]]:
        """Return the most frequent mistakes as (true, predicted, count), largest first, ties in class order."""
        if self.confusion is None:
            return []
        matrix = np.array(self.confusion, dtype=np.int64)
        np.fill_diagonal(matrix, 0)
        order = np.argsort(-matrix, axis=None, kind="stable")[:limit]
        cells = (divmod(int(cell), len(self.classes)) for cell in order)
        found = [(self.classes[true], self.classes[given], int(matrix[true, given])) for true, given in cells]
        return [pair for pair in found if pair[2]]

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as JSON values."""
        return {**asdict(self), "leading": self.leading.key}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation that `to_json` was called on. Accepts lists in place of tuples, as JSON files hold them."""
        confusion = data["confusion"]
        return cls(
            **{
                **{key: value for key, value in data.items() if key != "leading"},
                "classes": tuple(data["classes"]),
                "intervals": {key: (low, high) for key, (low, high) in data["intervals"].items()},
                "class_sizes": tuple(data.get("class_sizes", ())),
                "confusion": None if confusion is None else tuple(tuple(row) for row in confusion),
                "per_class": tuple(_class_metrics_from(row) for row in data["per_class"]),
                "bins": tuple(ReliabilityBin(**row) for row in data["bins"]),
            }
        )


def evaluate(predictions: Predictions, class_sizes: Sequence[int] = ()) -> Evaluation:
    """Compute the metrics of the task, their intervals and the table by class from a table of predictions.

    Args:
        class_sizes: images of each class in the whole dataset, which decide whether classes are unequal; default: of this table.

    Raises:
        InvalidInput: the table is empty or has no labels.
        TrainingError: a logit is NaN or infinite.
    """
    task = task_named(predictions.task)
    rows = predictions.image_results()
    precisions = task.class_precisions(rows) or [None] * len(predictions.classes)
    return Evaluation(
        task=task.name,
        classes=predictions.classes,
        n=len(rows),
        headline=task.headline.key,
        values={metric.key: metric.compute(rows) for metric in task.metrics},
        intervals={metric.key: metric.interval(rows) for metric in task.metrics if metric.interval},
        per_class=tuple(
            _class_metrics(name, *counts, precision)
            for name, counts, precision in zip(predictions.classes, task.class_counts(rows), precisions, strict=True)
        ),
        bins=task.reliability_bins(rows),
        confusion=task.confusion(rows),
        class_sizes=tuple(class_sizes),
        facts=task.facts(rows),
    )


def _class_metrics(
    name: str, n: int, n_predicted: int, n_correct: int, average_precision: tuple[float, Interval] | None
) -> ClassMetrics:
    intervals = {"precision": wilson_interval(n_correct, n_predicted)} if n_predicted else {}
    intervals |= {"recall": wilson_interval(n_correct, n)} if n else {}
    intervals |= {"average_precision": average_precision[1]} if average_precision else {}
    return ClassMetrics(
        name=name,
        n=n,
        n_predicted=n_predicted,
        n_correct=n_correct,
        precision=n_correct / n_predicted if n_predicted else None,
        recall=n_correct / n if n else None,
        f1=2 * n_correct / (n + n_predicted) if n else None,
        average_precision=average_precision[0] if average_precision else None,
        intervals=intervals,
    )


def _class_metrics_from(row: Mapping[str, Any]) -> ClassMetrics:
    intervals = {key: (low, high) for key, (low, high) in row.get("intervals", {}).items()}
    return ClassMetrics(**{**row, "intervals": intervals})


@dataclass(frozen=True)
class RunEvaluation:
    """A run's evaluations by split, and what was fitted on held-out images: the content of ``evaluation.json``."""

    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    temperature: Temperature | None = None
    thresholds: tuple[float, ...] | None = None  # (C,) the least logit for each label to be given; None: one threshold for all

    @property
    def metrics(self) -> dict[str, float]:
        """All figures under their ``split/name`` keys."""
        return {key: value for split, found in self.evaluations.items() for key, value in found.metrics(split).items()}


def write_evaluation(path: Path, run: RunEvaluation) -> None:
    """Write ``evaluation.json`` without indentation, since a confusion matrix may be large."""
    document = {
        "schema_version": 2,
        "splits": {split: evaluation.to_json() for split, evaluation in run.evaluations.items()},
        "temperature": asdict(run.temperature) if run.temperature else None,
        **({"thresholds": list(run.thresholds)} if run.thresholds is not None else {}),
    }
    write_atomic(path, lambda stream: stream.write((json_text(document) + "\n").encode()))


def read_evaluation(path: Path) -> RunEvaluation:
    """Read ``evaluation.json``."""
    document = read_json(path)
    temperature = document["temperature"]
    return RunEvaluation(
        {split: Evaluation.from_json(data) for split, data in document["splits"].items()},
        None if temperature is None else Temperature(**temperature),
        tuple(document["thresholds"]) if "thresholds" in document else None,
    )
