"""What a comparison came to: ``comparison.json``, the same document on the command line, over HTTP and in Python."""

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
from finetune.evaluation.verdict import COSTS, Standing, Verdict, judge_arms
from finetune.metrics.accuracy import MEAN_PER_CLASS_ACCURACY
from finetune.runs.model_cost import latencies
from finetune.runs.outcome import Outcome
from finetune.storage.rundir import RunDir
from finetune.tasks import task_named
from finetune.tasks.leading import recorded_leading


@dataclass(frozen=True)
class Figure:
    """One metric of an arm: the mean over its runs, with the 95 % interval on these images."""

    value: float
    low: float | None
    high: float | None
    n: int
    sd: float | None  # over runs; None with one run

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n, "sd": self.sd}


@dataclass(frozen=True)
class ArmResult:
    """What one arm came to."""

    name: str
    runs: tuple[Path, ...]  # folders, by seed
    metrics: Mapping[str, Figure]  # ``test/top1`` …
    cost: Mapping[str, float]  # mean over runs; names end in their unit
    per_class_recall: tuple[float | None, ...]  # mean over runs, in the order of the classes
    note: str = ""  # why the arm has fewer runs than was asked for

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
    """Arms, pairs and the verdict."""

    id: str
    folder: Path
    dataset: str
    split: str  # that the arms were judged on: test, or cv
    classes: tuple[str, ...]
    headline: str  # that the arms are tested by
    leading: str  # that is told first: a mean over classes where these are unequal
    arms: tuple[ArmResult, ...]
    pairs: tuple[Pair, ...]
    verdict: Verdict
    margin: float
    left_out: int = 0  # images that one of the runs had trained or chosen on
    cost: Mapping[str, float] | None = None  # of the whole comparison
    registered: str | None = None  # name@version of the chosen arm's best run
    mlflow_run_id: str | None = None

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def arm(self, name: str) -> ArmResult:
        """Return the arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def __repr__(self) -> str:
        return f"<comparison of {', '.join(arm.name for arm in self.arms)}: {self.verdict.sentence}>"

    def _repr_html_(self) -> str:
        """Draw the comparison in a notebook: the verdict, the arms, and the differences with their intervals."""
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
        """Return the document."""
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
    """Return one row a metric: the headline with its test, the others with their interval."""
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
    """Return a number that JSON has; it has neither infinity nor not-a-number."""
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
    """Compare finished arms and judge them: a function of predictions and outcomes, but for the models' latency.

    Each run measured its own when it was exported, beside whatever the machine did then. Here the models of all arms are measured
    in turns, because arms are compared by it.

    Raises:
        InvalidInput: fewer than two arms, or arms that did not answer the same images.
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
        verdict=judge_arms(standings, pairs, metric),
        margin=margin,
        left_out=left_out,
    )


def _latencies(arms: Sequence[ArmRuns]) -> Sequence[float | None]:
    """Return what one answer takes, by arm; nothing where an arm has no exported model, since then nothing can be compared."""
    runs = [run for arm in arms if (run := arm.exported) is not None]
    return latencies(runs) if len(runs) == len(arms) else [None] * len(arms)


def _arm_result(arm: ArmRuns, split: str, latency_seconds: float | None) -> ArmResult:
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
    """Return the interval of a mean over runs, where images and seeds vary; the headline and the mean over classes have one."""
    headline = task_named(arm.predictions.runs[0].task).headline
    if key == MEAN_PER_CLASS_ACCURACY.key:
        return class_mean_interval(arm.predictions)
    if key != headline.key:
        return None, None
    error, quantile = headline_error(arm.predictions)
    mean = statistics.fmean(values)
    return headline.bounded(mean - quantile * error, mean + quantile * error)
