"""The figures of a comparison: differences with intervals, cost against quality, recall by class, learning curves.

Arms are distinguished by colour and by marker; the colours are those of Okabe & Ito (2008), which are safe for colour-blind
readers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from finetune.messages import duration
from finetune.metrics import Metric
from finetune.report.figures import FAINT, INK, WIDTH_INCHES, Record, series, styled, to_svg

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_CLASSES = 30


def forest(pairs: Sequence[Mapping[str, Any]], key: str, margin: float, metric: Metric[Any]) -> str:
    """Draw a forest plot: each pair's difference of the headline metric with its 95 % interval, and the margin as a band."""
    return _svg(_forest([pair for pair in pairs if pair["metric"] == key], margin, metric))


def cost_against_quality(arms: Sequence[Mapping[str, Any]], key: str, metric: Metric[Any], pareto: Sequence[str]) -> str | None:
    """Draw each arm's headline metric against its training time; arms on the Pareto front are filled and connected."""
    known = [arm for arm in arms if arm["cost"].get("train_seconds")]
    return _svg(_cost(known, key, metric, pareto)) if len(known) > 1 else None


def class_recalls(arms: Sequence[Mapping[str, Any]], classes: Sequence[str], counts: Sequence[int]) -> str | None:
    """Draw the recall of each class for each arm, classes with the largest differences between arms first."""
    rows = [
        (name, n, [arm["per_class_recall"][index] for arm in arms])
        for index, (name, n) in enumerate(zip(classes, counts, strict=True))
        if all(arm["per_class_recall"][index] is not None for arm in arms)
    ]
    if not rows:
        return None
    rows.sort(key=lambda row: (-(max(row[2]) - min(row[2])), row[0]))
    return _svg(_classes([arm["name"] for arm in arms], rows[:MAX_CLASSES]))


def curves(journals: Mapping[str, Sequence[Record]], metric: Metric[Any]) -> str | None:
    """Draw train and val curves of each arm's first run by epoch; None if no arm has more than one evaluation."""
    found = {
        arm: {split: series(records, f"{split}/{metric.key}") for split in ("train", "val")} for arm, records in journals.items()
    }
    return _svg(_curves(found, metric)) if any(len(of_arm["val"]) > 1 for of_arm in found.values()) else None


def _svg(figure: Figure) -> str:
    return to_svg(figure)


@styled
def _forest(pairs: Sequence[Mapping[str, Any]], margin: float, metric: Metric[Any]) -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, 1.0 + 0.42 * len(pairs)))
    axes = figure.subplots()
    axes.axvspan(-margin, margin, color=FAINT, alpha=0.15, linewidth=0)
    axes.axvline(0, color=FAINT, linewidth=1)
    for row, pair in enumerate(reversed(pairs)):
        colour = COLOURS[0] if pair["outcome"] == "better" else INK
        axes.plot([pair["low"], pair["high"]], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot([pair["difference"]], [row], "o" if pair["outcome"] == "better" else "s", color=colour, markersize=6)
    axes.set_yticks(range(len(pairs)), [f"{pair['a']} − {pair['b']}" for pair in reversed(pairs)])
    axes.set_ylim(-0.7, len(pairs) - 0.3)
    unit = "points" if metric.percent else "difference"
    axes.set(title=f"Difference of {metric.label}, {unit}, with 95 % intervals; shaded: too small to matter")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+g}" if metric.percent else f"{value:+g}"))
    axes.grid(axis="y", visible=False)
    return figure


@styled
def _cost(arms: Sequence[Mapping[str, Any]], key: str, metric: Metric[Any], pareto: Sequence[str]) -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, 3.4))
    axes = figure.subplots()
    front = sorted((arm["cost"]["train_seconds"], arm["metrics"][key]["value"]) for arm in arms if arm["name"] in pareto)
    axes.plot(*zip(*front, strict=True), color=FAINT, linewidth=1, linestyle="--", zorder=1)
    for index, arm in enumerate(arms):
        figure_of_arm = arm["metrics"][key]
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        x, y = arm["cost"]["train_seconds"], figure_of_arm["value"]
        if figure_of_arm["low"] is not None:
            axes.plot([x, x], [figure_of_arm["low"], figure_of_arm["high"]], color=colour, linewidth=1.6)
        filled = colour if arm["name"] in pareto else "none"
        axes.plot([x], [y], marker, markersize=8, markerfacecolor=filled, markeredgecolor=colour, zorder=3)
        axes.annotate(arm["name"], (x, y), xytext=(8, 4), textcoords="offset points", color=INK)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.margins(x=0.25, y=0.15)
    axes.set(
        title=f"{metric.label.capitalize()} over training time; filled: no arm is as good at lower cost", xlabel="training time"
    )
    if metric.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    return figure


@styled
def _classes(arms: Sequence[str], rows: Sequence[tuple[str, int, Sequence[float]]]) -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, 1.2 + 0.3 * len(rows)))
    axes = figure.subplots()
    for row, (_, _, recalls) in enumerate(reversed(rows)):
        axes.plot([min(recalls), max(recalls)], [row, row], color=FAINT, linewidth=1, zorder=1)
        for index, recall in enumerate(recalls):
            axes.plot(
                [recall], [row], MARKERS[index % len(MARKERS)], color=COLOURS[index % len(COLOURS)], markersize=6, alpha=0.9
            )
    axes.set_yticks(range(len(rows)), [f"{name} ({n})" for name, n, _ in reversed(rows)])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(title="Recall of each class by arm; number of images in brackets")
    handles = [
        axes.plot([], [], MARKERS[index % len(MARKERS)], color=COLOURS[index % len(COLOURS)], linestyle="", label=name)[0]
        for index, name in enumerate(arms)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(arms), 4))
    return figure


@styled
def _curves(found: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], metric: Metric[Any]) -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, 3.2))
    axes = figure.subplots()
    for index, (arm, of_arm) in enumerate(found.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        if len(of_arm["val"]) > 1:
            axes.plot(*zip(*of_arm["val"], strict=True), color=colour, marker=marker, markersize=4, label=f"{arm}, val")
        elif of_arm["val"]:
            axes.axhline(of_arm["val"][0][1], color=colour, linestyle="-", linewidth=1, label=f"{arm}, val (solved)")
        if len(of_arm["train"]) > 1:
            axes.plot(*zip(*of_arm["train"], strict=True), color=colour, linestyle=":", linewidth=1.4, label=f"{arm}, train")
    axes.set(title=f"{metric.label.capitalize()} by epoch, first run of each arm", xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if metric.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


__all__ = ["class_recalls", "cost_against_quality", "curves", "forest"]
