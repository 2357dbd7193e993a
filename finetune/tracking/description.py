"""Describe a run or study in Markdown: metrics with numbers of images, costs, and the command that repeats it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from finetune.metrics import Metric
from finetune.storage.rundir import RunDir
from finetune.tasks import task_named
from finetune.tasks.leading import WHY_OVER_CLASSES, leading_first, recorded_leading
from finetune.tracking.view import RunView, children, read_object, read_view

SPLITS = {
    "cv": "images, each by a model that had not seen it",
    "test": "test images",
    "val": "val images, which also chose the weights",
}  # most independent images first
SHOWN_COSTS = {
    "train_seconds": "training",
    "trainable_parameters": "trainable parameters",
    "latency_seconds": "one image",
    "bundle_bytes": "bundle",
}  # of arms
MOST_CHILDREN = 60


def describe(run: RunDir, view: RunView) -> str:
    """Return the description of a run, of a study with a table of its runs, or of a comparison with its verdict."""
    outcome, comparison = read_object(run.outcome), read_object(run.comparison)
    parts: list[str] = []
    if comparison:
        parts += _comparison(comparison)
    parts += [] if comparison else [_headline(view, outcome)]
    parts += [str(outcome.get("summary", "")), _failure(run), _splits(view, outcome)]
    if view.study is not None:
        parts.append(_runs(run))
    parts += [_cost(view), _model(view), *(f"Note: {warning}" for warning in outcome.get("warnings", ()))]
    if view.status != "RUNNING" and run.request.exists():
        parts.append("Repeat it: `finetune compare request.json`, with `request.json` from the artifacts.")
    elif view.status != "RUNNING" and run.spec.exists():
        parts.append("Repeat it: `finetune train spec.yaml`, with `spec.yaml` from the artifacts.")
    return "\n\n".join(part for part in parts if part)


def _headline(view: RunView, outcome: Mapping[str, Any]) -> str:
    if view.headline is None:
        return (
            ""
            if view.figures
            else {"FINISHED": "", "RUNNING": "Running.", "KILLED": "Stopped before the end.", "FAILED": "Failed."}[view.status]
        )
    split = view.headline.partition("/")[0]
    low, high = (view.figures[f"{view.headline}_{bound}"] for bound in ("low", "high"))
    metric = _metrics(view)[view.headline.partition("/")[2]]
    n = view.figures[f"{split}/n"]
    task = task_named(str(view.params.get("task", "multiclass")))
    why = "" if metric.key == task.headline.key else f"; {WHY_OVER_CLASSES}"
    return (
        f"**{metric.label} {metric.text(view.figures[view.headline])}** on {n:,.0f} {SPLITS[split]} "
        f"(95 % interval {metric.text(low)} to {metric.text(high)}{why})"
    )


def _failure(run: RunDir) -> str:
    error = read_object(run.error)
    if not error:
        return ""
    problems = [f"- {problem['where']}: {problem['message']}" for problem in error.get("problems", ())]
    return "\n".join([f"**{error['code']}**: {error['message']}", "", *problems]).strip()


def _splits(view: RunView, outcome: Mapping[str, Any]) -> str:
    """Return a table of all metrics on all evaluated splits."""
    splits = [split for split in SPLITS if f"{split}/n" in view.figures]
    if not splits or not outcome:
        return ""
    rows = []
    task = task_named(str(view.params.get("task", "multiclass")))
    for metric in leading_first(task, recorded_leading(task, view.figures, splits[0])):
        key = metric.key
        values = [view.figures.get(f"{split}/{key}") for split in splits]
        if any(value is not None for value in values):
            rows.append([metric.label, *("–" if value is None else metric.text(value) for value in values)])
    counts = ["images", *(f"{view.figures[f'{split}/n']:,.0f}" for split in splits)]
    return table(["", *splits], [*rows, counts])


def _runs(run: RunDir) -> str:
    """Return a table of the runs of a study."""
    rows = []
    for child in children(run):
        view = read_view(child, alive=True)
        value, interval, n = _leading_metric(view)
        seconds = view.costs.get("train_seconds")
        rows.append([child.root.name, str(view.params.get("method", "")), value, interval, n, _seconds(seconds)])
    left_out = f"\n\n… and {len(rows) - MOST_CHILDREN} more" if len(rows) > MOST_CHILDREN else ""
    columns = ["run", "method", "metric", "95 % interval", "images", "training"]
    return table(columns, rows[:MOST_CHILDREN]) + left_out if rows else ""


def _leading_metric(view: RunView) -> tuple[str, str, str]:
    if view.headline is None:
        return "–", "–", "–"
    split, _, key = view.headline.partition("/")
    metric = _metrics(view)[key]
    value, low, high = (
        metric.text(view.figures[name]) for name in (view.headline, f"{view.headline}_low", f"{view.headline}_high")
    )
    return f"{split} {metric.label} {value}", f"{low} to {high}", f"{view.figures[f'{split}/n']:,.0f}"


def _comparison(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the verdict, the arms and the differences between them."""
    if sentence := found.get("verdict", {}).get("sentence"):
        yield f"**{sentence}**"
    arms = found.get("arms", ())
    keys = list(dict.fromkeys(key for arm in arms for key in arm["metrics"]))
    leading = found.get("leading")
    shown = [key for key in keys if any(arm["metrics"].get(key, {}).get("low") is not None for arm in arms)]
    shown.sort(key=lambda key: key != leading)
    costs = [key for key in SHOWN_COSTS if any(key in arm.get("cost", {}) for arm in arms)]
    rows = [
        [
            arm["name"],
            str(len(arm["runs"])),
            *(_figure(arm["metrics"].get(key)) for key in shown),
            *(_quantity(key, arm.get("cost", {}).get(key)) for key in costs),
        ]
        for arm in arms
    ]
    if rows:
        yield table(["arm", "runs", *(f"{key} (95 % interval)" for key in shown), *(SHOWN_COSTS[key] for key in costs)], rows)
    pairs = [
        [
            f"{pair['a']} − {pair['b']}",
            pair["metric"],
            f"{pair['difference']:+.4f}",
            f"{pair['low']:+.4f} to {pair['high']:+.4f}",
            f"{pair['p_adjusted']:.3g}",
        ]
        for pair in found.get("pairs", ())
        if pair.get("p_adjusted") is not None
    ]
    if pairs:
        yield table(["pair", "metric", "difference", "95 % interval", "p, adjusted"], pairs)


def _figure(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    interval = "" if found["low"] is None else f" ({found['low']:.4f} to {found['high']:.4f}, n {found['n']:,})"
    return f"{found['value']:.4f}{interval}"


def _cost(view: RunView) -> str:
    costs = view.costs
    phrases = []
    if "train_seconds" in costs:
        features = f", {_seconds(costs['feature_seconds'])} of it for frozen features" if "feature_seconds" in costs else ""
        phrases.append(f"training without cached features {_seconds(costs['train_seconds'])}{features}")
        phrases.append(f"this run {_seconds(costs.get('wall_seconds'))}")
    labels = {
        "peak_memory_bytes": "peak memory {}",
        "trainable_parameters": "{} trainable parameters",
        "bundle_bytes": "bundle {}",
        "latency_seconds": "{} for one image on one core",
    }
    phrases += [label.format(_quantity(key, costs[key])) for key, label in labels.items() if key in costs]
    return f"Cost: {', '.join(phrases)}." if phrases else ""


def _model(view: RunView) -> str:
    if view.model is None or view.model.version is None:
        return ""
    return f"Registered as `{view.model.name}` version {view.model.version}."


def _metrics(view: RunView) -> dict[str, Metric[Any]]:
    return {metric.key: metric for metric in task_named(str(view.params.get("task", "multiclass"))).metrics}


def _quantity(name: str, value: float | None) -> str:
    """Return a cost with the unit that its name carries."""
    if value is None:
        return "–"
    if name.endswith("_bytes"):
        return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if name.endswith("_seconds"):
        return _seconds(value)
    return f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 1:
        return f"{value * 1000:.1f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:,.0f} min"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
