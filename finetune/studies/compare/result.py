"""The result of a comparison, ``comparison.json``: the same document on the command line, over HTTP and in Python."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from finetune.evaluation.compare import ArmPredictions, Difference, Pair, class_mean_interval, compare_pairs, headline_error
from finetune.evaluation.evaluate import evaluate
from finetune.evaluation.verdict import COSTS, Standing, Verdict, decide_verdict
from finetune.metrics.accuracy import MEAN_PER_CLASS_ACCURACY
from finetune.runs.model_cost import latencies
from finetune.runs.outcome import Outcome
from finetune.storage.rundir import RunDir
from finetune.tasks import task_named
from finetune.tasks.leading import recorded_leading


@dataclass(frozen=True)
class Figure:
    """One metric of an arm: the mean over its runs, with its 95 % confidence interval and the number of images."""

    value: float
    low: float | None
    high: float | None
    n: int
    sd: float | None  # standard deviation over runs; None for one run

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n, "sd": self.sd}


@dataclass(frozen=True)
class ArmResult:
    """The result of one arm."""

    name: str
    runs: tuple[Path, ...]  # folders, by seed
    metrics: Mapping[str, Figure]  # ``test/top1`` …
    cost: Mapping[str, float]  # mean over runs; names end in their unit
    per_class_recall: tuple[float | None, ...]  # mean over runs, in the order of the classes
    note: str = ""  # why the arm has fewer runs than requested

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "runs": [str(run) for run in self.runs],
            "metrics": {key: figure.to_dict() for key, figure in self.metrics.items()},
            "cost": dict(self.cost),
            "per_class_recall": list(self.per_class_recall),
            "note": self.note,
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> ArmResult:
        """Return the arm that `to_dict` wrote."""
        return cls(
            name=given["name"],
            runs=tuple(Path(run) for run in given["runs"]),
            metrics={key: Figure(**figure) for key, figure in given["metrics"].items()},
            cost=given["cost"],
            per_class_recall=tuple(given["per_class_recall"]),
            note=given["note"],
        )


@dataclass(frozen=True, repr=False)
class Comparison:
    """The results of the arms, the paired differences between them, and the verdict."""

    id: str
    folder: Path
    dataset: str
    split: str  # that the arms were evaluated on: test, or cv for pooled folds
    classes: tuple[str, ...]
    headline: str  # the metric that the arms are compared by in tests
    leading: str  # the metric that is shown first; a mean over classes if these have very different sizes
    arms: tuple[ArmResult, ...]
    pairs: tuple[Pair, ...]
    verdict: Verdict
    margin: float
    left_out: int = 0  # test images that are in train or val of one of the runs
    cost: Mapping[str, float] | None = None  # of the whole comparison
    registered: str | None = None  # name@version of the chosen arm's best run
    mlflow_run_id: str | None = None

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def arm(self, name: str) -> ArmResult:
        """Return the arm with this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def __repr__(self) -> str:
        return f"<comparison of {', '.join(arm.name for arm in self.arms)}: {self.verdict.sentence}>"

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the verdict, the arms, and the differences with their intervals."""
        from finetune.report.comparison_page import notebook_view

        return notebook_view(self.to_dict())

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Comparison:
        """Return the comparison that `to_dict` wrote."""
        verdict = document["verdict"]
        return cls(
            id=document["id"],
            folder=Path(document["report"]).parent,
            dataset=document["dataset"],
            split=document["split"],
            classes=tuple(document["classes"]),
            headline=document["headline"].partition("/")[2],
            leading=document.get("leading", document["headline"]).partition("/")[2],  # version 0.1 had none
            arms=tuple(ArmResult.from_dict(arm) for arm in document["arms"]),
            pairs=_pairs_of(document["pairs"], verdict["margin"]),
            verdict=Verdict(verdict["choose"], verdict["outcome"], verdict["sentence"], tuple(verdict["pareto"])),
            margin=verdict["margin"],
            left_out=document["left_out"],
            cost=document["cost"],
            registered=document["registered"],
            mlflow_run_id=document["mlflow_run_id"],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {
            "object": "comparison",
            "id": self.id,
            "dataset": self.dataset,
            "split": self.split,
            "classes": list(self.classes),
            "headline": f"{self.split}/{self.headline}",
            "leading": f"{self.split}/{self.leading}",
            "arms": [arm.to_dict() for arm in self.arms],
            "pairs": [row for pair in self.pairs for row in _pair_rows(pair, self.split)],
            "verdict": {
                "choose": self.verdict.choose,
                "outcome": self.verdict.outcome,
                "sentence": self.verdict.sentence,
                "pareto": list(self.verdict.pareto),
                "margin": self.margin,
            },
            "left_out": self.left_out,
            "cost": dict(self.cost or {}),
            "registered": self.registered,
            "report": str(self.report),
            "mlflow_run_id": self.mlflow_run_id,
        }


_OF_PAIR = ("p_value", "p_exact", "p_adjusted", "test", "smallest_detectable", "n", "only_a", "only_b")
_OF_DIFFERENCE = ("difference", "low", "high", "standard_error", "degrees_of_freedom", "seed_share")


def _pair_rows(pair: Pair, split: str) -> list[dict[str, Any]]:
    """Return a row for each metric of a pair: the headline with its statistical test, the others with their interval only."""
    tested = {**{name: getattr(pair, name) for name in _OF_PAIR}, "outcome": pair.outcome}
    return [
        {
            "a": pair.a,
            "b": pair.b,
            "metric": f"{split}/{found.metric}",
            **{name: _finite(getattr(found, name)) for name in _OF_DIFFERENCE},
            **(tested if found is pair.headline else dict.fromkeys(tested)),
        }
        for found in (pair.headline, *pair.others)
    ]


def _pairs_of(rows: Sequence[Mapping[str, Any]], margin: float) -> tuple[Pair, ...]:
    """Return the pairs that `_pair_rows` wrote."""
    pairs = []
    for (a, b), of_pair in groupby(rows, key=lambda row: (row["a"], row["b"])):
        headline, *others = of_pair
        differences = [
            Difference(a, b, row["metric"].partition("/")[2], **{name: _number(row[name], name) for name in _OF_DIFFERENCE})
            for row in (headline, *others)
        ]
        pairs.append(
            Pair(a, b, differences[0], tuple(differences[1:]), margin=margin, **{name: headline[name] for name in _OF_PAIR})
        )
    return tuple(pairs)


def _finite(value: float) -> float | None:
    """Return a finite value unchanged, and None for infinity and NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def _number(value: float | None, name: str) -> float:
    if value is not None:
        return value
    return math.inf if name == "degrees_of_freedom" else math.nan


@dataclass(frozen=True)
class ArmRuns:
    """The finished runs of one arm, before they are compared."""

    predictions: ArmPredictions
    outcomes: tuple[Outcome, ...]
    note: str = ""

    @property
    def exported(self) -> RunDir | None:
        """The first run whose model was exported."""
        runs = (RunDir(outcome.run) for outcome in self.outcomes)
        return next((run for run in runs if run.bundle.is_dir()), None)


def conclude(
    arms: Sequence[ArmRuns],
    *,
    identifier: str,
    folder: Path,
    dataset: str,
    split: str,
    margin: float,
    left_out: int = 0,
) -> Comparison:
    """Compare finished arms and decide between them.

    The result follows from predictions and outcomes, except for the latency. The latency that each run measured at its export
    depends on the load at that time, so the models of all arms are measured again here, in turn.

    Args:
        identifier: of the comparison.
        folder: of the comparison.
        split: that the predictions are of.
        margin: largest difference of the headline metric that does not matter.
        left_out: number of images that were left out because a run has trained or chosen on them.

    Raises:
        InvalidInput: there are fewer than two arms, or the arms were not evaluated on the same images.
    """
    reference = arms[0].predictions.runs[0]
    metric = task_named(reference.task).headline
    pairs = compare_pairs([arm.predictions for arm in arms], margin)
    results = tuple(_arm_result(arm, split, latency) for arm, latency in zip(arms, _latencies(arms), strict=True))
    standings = [
        Standing(arm.name, arm.metrics[f"{split}/{metric.key}"].value, {k: arm.cost[k] for k in COSTS if k in arm.cost})
        for arm in results
    ]
    return Comparison(
        id=identifier,
        folder=folder,
        dataset=dataset,
        split=split,
        classes=reference.classes,
        headline=metric.key,
        leading=recorded_leading(task_named(reference.task), arms[0].outcomes[0].metrics, split).key,
        arms=results,
        pairs=pairs,
        verdict=decide_verdict(standings, pairs, metric),
        margin=margin,
        left_out=left_out,
    )


def _latencies(arms: Sequence[ArmRuns]) -> Sequence[float | None]:
    """Return the latency of each arm in seconds; None for all arms if one of them has no exported model to compare with."""
    runs = [run for arm in arms if (run := arm.exported) is not None]
    return latencies(runs) if len(runs) == len(arms) else [None] * len(arms)


def _arm_result(arm: ArmRuns, split: str, latency_seconds: float | None) -> ArmResult:
    """Return metrics with intervals, cost and recalls of one arm, as means over its runs."""
    evaluations = [evaluate(run) for run in arm.predictions.runs]
    first, n = evaluations[0], evaluations[0].n
    metrics = {}
    for key in first.values:
        values = [found.values[key] for found in evaluations]
        low, high = first.intervals.get(key, (None, None))
        if len(values) > 1 and low is not None:
            low, high = _interval_of_mean(arm, key, values)
        sd = statistics.stdev(values) if len(values) > 1 else None
        metrics[f"{split}/{key}"] = Figure(statistics.fmean(values), low, high, n, sd)
    costs = [outcome.cost for outcome in arm.outcomes]
    names = sorted({name for cost in costs for name in cost})
    mean_cost = {name: statistics.fmean([cost[name] for cost in costs if name in cost]) for name in names}
    if latency_seconds is not None:
        mean_cost["latency_seconds"] = latency_seconds
    recalls = list(zip(*([row.recall for row in found.per_class] for found in evaluations), strict=True))
    return ArmResult(
        name=arm.predictions.name,
        runs=tuple(outcome.run for outcome in arm.outcomes),
        metrics=metrics,
        cost=mean_cost,
        per_class_recall=tuple(None if found[0] is None else statistics.fmean(found) for found in recalls),
        note=arm.note,
    )


def _interval_of_mean(arm: ArmRuns, key: str, values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the 95 % interval of a metric's mean over runs, considering the variation of images and of seeds.

    Returns:
        (low, high); (None, None) for metrics other than the headline and the mean over classes.
    """
    headline = task_named(arm.predictions.runs[0].task).headline
    if key == MEAN_PER_CLASS_ACCURACY.key:
        return class_mean_interval(arm.predictions)
    if key != headline.key:
        return None, None
    error, quantile = headline_error(arm.predictions)
    mean = statistics.fmean(values)
    return headline.bounded(mean - quantile * error, mean + quantile * error)
