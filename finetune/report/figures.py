"""The figures of a run (matplotlib): curves, gradients, confusion matrix, classes, calibration, L2 path of the solved head.

They are drawn from lines of ``metrics.jsonl`` and from `Evaluation`s. Figures are created with `Figure` instead of pyplot, so
there is no global state and no display. They have a transparent background and one foreground colour, so that a page can invert
them in dark mode.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from finetune.bundle.calibration import Calibration
from finetune.evaluation.calibrate import AccuracyCoverage
from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.folds import CrossValidation
from finetune.metrics import Metric
from finetune.report.text import SHOWN_CLASSES
from finetune.tasks import Task, task_named

INK, FAINT, GRID = "#24292f", "#6e7781", "#d8dee4"
TRAIN, VAL, BEST = "#d9730d", "#2563eb", "#15803d"
WIDTH_INCHES = 9.3
MAX_LABELLED_CLASSES = 100

_STYLE = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$5 note$"
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text: small, selectable, and in any script for which the reader has a font
    "svg.hashsalt": "finetune",  # makes the output deterministic
}

Record = Mapping[str, Any]  # one line of metrics.jsonl
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # matplotlib measures text with its own font; the browser still draws characters that this font lacks.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


def styled(draw: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Apply the style of this module while the decorated function draws."""

    @wraps(draw)
    def drawn(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with _style():
            return draw(*args, **kwargs)

    return drawn


def to_svg(figure: Figure) -> str:
    """Return the figure as an ``<svg>`` element with transparent background, without XML prolog, dates or external references."""
    stream = io.StringIO()
    with _style():
        figure.savefig(
            stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = stream.getvalue()
    return text[text.index("<svg") :]


def series(records: Sequence[Record], key: str, by: str = "epoch") -> list[tuple[float, float]]:
    """Return (epoch or step, value) of each line that has both, in order; the last value of a step repeated after a resume."""
    points = {
        float(line[by]): float(line["values"][key]) for line in records if key in line["values"] and line.get(by) is not None
    }
    return sorted(points.items())


def best_epoch(records: Sequence[Record], headline: str) -> float | None:
    """Return the epoch with the highest headline metric on val; among equals the one with the lowest val loss."""
    loss = dict(series(records, "val/loss"))
    values = series(records, f"val/{headline}")
    return max(values, key=lambda point: (point[1], -loss.get(point[0], math.inf)))[0] if values else None


@styled
def learning_curves(records: Sequence[Record], task: Task, phases: Sequence[Mapping[str, Any]] = ()) -> Figure | None:
    """Draw the headline metric and the loss by epoch, with shaded phases and the best epoch marked; None without epochs."""
    if len(series(records, "val/loss")) < 2:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 3.4))
    best = best_epoch(records, task.headline.key)
    shown = {metric.key: metric for metric in (task.headline, task.mean_score)}
    panels = [*((metric.key, _capital(metric.label), metric.percent) for metric in shown.values()), ("loss", "Loss", False)]
    for axes, (name, title, percent) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        curves = {split: series(records, f"{split}/{name}") for split in ("train", "val")}
        _shade_phases(axes, phases)
        for split, colour, marker in (("train", TRAIN, "s"), ("val", VAL, "o")):
            if curves[split]:
                axes.plot(*zip(*curves[split], strict=True), color=colour, marker=marker, markersize=3, label=split)
        value = None if best is None else dict(curves["val"]).get(best)
        if best is not None and value is not None:
            axes.plot([best], [value], "o", markersize=9, markerfacecolor="none", markeredgecolor=BEST, markeredgewidth=1.8)
            value_shown = f"{value:.1%}" if percent else f"{value:.3f}"
            where = f"at epoch {best:g}" if name == task.headline.key else "there"
            title += f"{chr(10) if len(panels) > 2 else ' · '}val {value_shown} {where}"
        axes.set(title=title, xlabel="epoch")
        axes.margins(y=0.18)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _shade_phases(axes: Axes, phases: Sequence[Mapping[str, Any]]) -> None:
    stepped = [phase for phase in phases if phase["n_epochs"]]
    if len(stepped) < 2:
        return
    start = 0.0
    for number, phase in enumerate(stepped):
        end = start + phase["n_epochs"]
        axes.axvspan(start, end, color=FAINT, alpha=0.14 if number % 2 else 0.04, linewidth=0)
        axes.text(
            (start + end) / 2,
            1.0,
            phase["name"],
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=7,
            color=FAINT,
        )
        start = end


@styled
def learning_rate(records: Sequence[Record]) -> Figure | None:
    """Draw the learning rate by step; None if there is none."""
    points = series(records, "train/lr", by="step")
    if len(points) < 2:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 2.0))
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), color=VAL, marker="o", markersize=2.5)
    axes.set(title="Learning rate of the head", xlabel="step", ylim=(0, None))
    axes.yaxis.set_major_formatter(_plain)
    return figure


@styled
def stage_signals(records: Sequence[Record], stage_names: Mapping[str, str] | None = None) -> Figure | None:
    """Draw gradient norm and update ratio of each trained stage by step, coloured from the stem (dark) to the head (light)."""
    found = {match[1] for line in records for key in line["values"] if (match := re.fullmatch(r"train/grad_norm/(.+)", key))}
    if max((len(series(records, f"train/grad_norm/{part}", by="step")) for part in found), default=0) < 2:
        return None
    parts = sorted(found, key=lambda part: (part == "head", [int(digits) for digits in re.findall(r"\d+", part)], part))
    colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.82, len(parts)))
    figure = Figure(figsize=(WIDTH_INCHES, 3.6))
    panels = figure.subplots(1, 2)
    for axes, name, title in zip(panels, ("grad_norm", "update_ratio"), ("Gradient norm", "Step ÷ weight norm"), strict=True):
        for part, colour in zip(parts, colours, strict=True):
            points = [(step, value) for step, value in series(records, f"train/{name}/{part}", by="step") if value > 0]
            if points:
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
                axes.plot(steps, _smooth(values), color=colour, label=(stage_names or {}).get(part, part))
        axes.set(title=title, xlabel="step", yscale="log")
        _label_log_axis(axes.yaxis)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize=8)
    return figure


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the running median over a tenth of the points, since values of single steps are noisy."""
    half = len(values) // 20
    return [float(np.median(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


@FuncFormatter
def _plain(value: float, _position: int | None) -> str:
    """Format tick labels as 0.001 and 1e-05; matplotlib's default format needs math text, which is off."""
    return f"{value:g}"


def _label_log_axis(axis: Axis) -> None:
    axis.set_major_formatter(_plain)
    axis.set_minor_formatter(NullFormatter())
    low, high = axis.get_view_interval()
    if math.log10(high / low) < 2.5:  # with labels at powers of ten only there would be almost none
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))


@styled
def confusion_matrix(evaluation: Evaluation) -> Figure | None:
    """Draw the counts, shaded by their share of the true class, correct ones blue, mistakes orange; None if multi-label."""
    if evaluation.confusion is None:
        return None
    matrix = np.array(evaluation.confusion, dtype=np.float64)  # (C, C) true, predicted
    n_classes = len(matrix)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    cells = np.empty((n_classes, n_classes, 4))  # RGBA in 0..1
    cells[..., :3] = to_rgb(TRAIN)
    cells[np.arange(n_classes), np.arange(n_classes), :3] = to_rgb(VAL)
    cells[..., 3] = np.where(matrix > 0, 0.12 + 0.88 * share, 0.0)  # one image in a hundred is still visible
    size = float(np.clip(2.6 + 0.26 * n_classes, 3.6, 13.0))
    figure = Figure(figsize=(size + 0.6, size))
    axes = figure.subplots()
    axes.imshow(cells, interpolation="none", extent=(-0.5, n_classes - 0.5, n_classes - 0.5, -0.5))
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(True)
    axes.set(xlabel="predicted", ylabel="true")
    if n_classes <= MAX_LABELLED_CLASSES:
        font_size = float(np.interp(n_classes, [10, 30, 60, 100], [9, 8, 6.5, 5.5]))
        labels = [_short(name) for name in evaluation.classes]
        axes.set_xticks(range(n_classes), labels, fontsize=font_size, rotation=90 if n_classes > 3 else 0)
        axes.set_yticks(range(n_classes), labels, fontsize=font_size)
        axes.tick_params(length=0)
    if n_classes <= 25:
        for true, predicted in np.argwhere(matrix > 0):
            # White text is more legible than dark text on the darkest blue only, never on orange.
            colour = "white" if true == predicted and share[true, predicted] > 0.77 else INK
            axes.text(
                predicted, true, f"{matrix[true, predicted]:.0f}", ha="center", va="center", color=colour,
                fontsize=9 if n_classes <= 12 else 7,
            )  # fmt: skip
    return figure


@styled
def per_class_bars(evaluation: Evaluation) -> Figure:
    """Draw recall as bars and precision as dots, for at most the `SHOWN_CLASSES` worst classes, worst on top.

    For a multi-label task the average precision is drawn too.
    """
    rows = sorted((row for row in evaluation.per_class if row.recall is not None), key=lambda row: (row.recall, row.name))
    shown = rows[:SHOWN_CLASSES]
    figure = Figure(figsize=(WIDTH_INCHES, 1.1 + 0.2 * len(shown)))
    axes = figure.subplots()
    places = range(len(shown))
    axes.barh(places, [row.recall or 0.0 for row in shown], color=VAL, alpha=0.75, height=0.7, label="recall")
    dots = [(row.precision, place) for place, row in enumerate(shown) if row.precision is not None]
    axes.plot(*zip(*dots, strict=True), "D", color=TRAIN, markersize=4.5, label="precision", zorder=3, clip_on=False)
    ranked = [(row.average_precision, place) for place, row in enumerate(shown) if row.average_precision is not None]
    if ranked:
        axes.plot(
            *zip(*ranked, strict=True), "|", color=INK, markersize=11, markeredgewidth=2, label="average precision", zorder=4
        )
    axes.set_yticks(places, [f"{_short(row.name)}  ({row.n})" for row in shown], fontsize=8)
    axes.set(xlim=(0, 1.02), ylim=(len(shown) - 0.4, -0.6))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3 if ranked else 2)
    return figure


@styled
def reliability_diagram(before: Evaluation, after: Evaluation | None = None) -> Figure:
    """Draw accuracy against confidence in the bins of the ECE, with the counts of the bins below; also after calibration."""
    shown = [("", before)] if after is None else [("Before: ", before), ("After temperature: ", after)]
    figure = Figure(figsize=(5.2 if after is None else WIDTH_INCHES, 4.6))
    names = task_named(before.task).reliability_axes
    columns = figure.subplots(2, len(shown), sharex=True, sharey="row", height_ratios=(3, 1), squeeze=False)
    for (title, evaluation), top, bottom in zip(shown, columns[0], columns[1], strict=True):
        filled = [(b, b.confidence, b.accuracy) for b in evaluation.bins if b.confidence is not None and b.accuracy is not None]
        centres = [(b.lower + b.upper) / 2 for b, _, _ in filled]
        width = 0.92 / len(evaluation.bins)
        top.bar(centres, [accuracy for _, _, accuracy in filled], width=width, color=VAL, alpha=0.75, label=names[1])
        top.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--", label="perfect")
        top.plot(
            [c for _, c, _ in filled], [a for _, _, a in filled], "D", color=TRAIN, markersize=4, label="at its mean confidence"
        )
        top.set(title=f"{title}ECE {evaluation.values['ece']:.3f} on {evaluation.n:,} images", ylim=(0, 1.02), xlim=(0, 1))
        bottom.bar(centres, [b.n for b, _, _ in filled], width=width, color=FAINT)
        bottom.set(xlabel=names[0])
        bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    columns[0, 0].set_ylabel(names[1])
    figure.legend(*columns[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    columns[1, 0].set_ylabel(names[2])
    return figure


@styled
def accuracy_coverage(curve: AccuracyCoverage, calibration: Calibration | None = None) -> Figure:
    """Draw the accuracy of the most confident predictions by the share of images answered, with the checked operating point."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.4))
    axes = figure.subplots()
    axes.fill_between(curve.answered, curve.low, curve.high, color=VAL, alpha=0.15, linewidth=0, label="95 % interval")
    axes.plot(curve.answered, curve.accuracy, color=VAL, label="accuracy of the answers given")
    checked = calibration.checked.get("precision") if calibration is not None else None
    if checked:
        axes.axhline(checked["asked"], color=FAINT, linewidth=1, linestyle="--", label=f"{checked['asked']:.0%} asked")
        if "value" in checked:
            errors = [[checked["value"] - checked["low"]], [checked["high"] - checked["value"]]]
            axes.errorbar(
                [checked["answered"]], [checked["value"]], yerr=errors, fmt="D", color=TRAIN, markersize=6, capsize=4,
                label=f"where it abstains: answers {checked['answered']:.0%}",
            )  # fmt: skip
    axes.set(xlabel="share of images answered, the most confident first", ylabel="accuracy", xlim=(0, 1.01))
    axes.set_ylim(max(0.0, min(curve.accuracy) - 0.12), 1.01)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(loc="lower left")
    return figure


@styled
def l2_path(points: Sequence[Mapping[str, float]], chosen: float, metric: Metric[Any]) -> Figure | None:
    """Draw val loss and metric of the solved head by L2 strength; `points` have ``l2``, ``val_nll``, ``val_score``."""
    if len(points) < 2:
        return None
    ordered = sorted(points, key=lambda point: point["l2"])
    figure = Figure(figsize=(WIDTH_INCHES, 2.7))
    for axes, name, title in zip(
        figure.subplots(1, 2), ("val_nll", "val_score"), ("Held-out loss", f"Held-out {metric.label}"), strict=True
    ):
        axes.plot([p["l2"] for p in ordered], [p[name] for p in ordered], color=VAL, marker="o", markersize=3.5)
        axes.axvline(chosen, color=BEST, linewidth=1.2, linestyle="--")
        axes.set(title=title, xlabel="L2 strength", xscale="log")
        _label_log_axis(axes.xaxis)
        axes.margins(y=0.15)
        axes.annotate(
            f"chosen {chosen:.2g}", (chosen, 1), xycoords=axes.get_xaxis_transform(), xytext=(5, -4), textcoords="offset points",
            ha="left", va="top", color=BEST,
        )  # fmt: skip
        if name == "val_score" and metric.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


@styled
def fold_scores(found: CrossValidation) -> Figure:
    """Draw each fold's metrics on its held-out images, their mean with its interval, and the pooled value."""
    figure = Figure(figsize=(WIDTH_INCHES, 2.9))
    pooled = found.pooled.metrics("cv")
    numbers = [fold.fold for fold in found.folds]
    headline = found.pooled.leading
    panels = ((headline.key, _capital(headline.label)), ("macro_f1", "Macro F1"), ("loss", "Loss"))
    for axes, (name, title) in zip(figure.subplots(1, 3), panels, strict=True):
        spread = found.spreads[name]
        axes.axhspan(*spread.interval, color=VAL, alpha=0.13, linewidth=0, label="95 % interval of the mean")
        axes.axhline(spread.mean, color=VAL, linewidth=1.2, label="mean over folds")
        axes.axhline(pooled[f"cv/{name}"], color=BEST, linewidth=1.2, linestyle="--", label="all answers pooled")
        axes.plot(numbers, [fold.metrics[f"test/{name}"] for fold in found.folds], "o", color=TRAIN, markersize=5, label="a fold")
        axes.set(title=title, xlabel="fold", xlim=(0.5, len(numbers) + 0.5))
        axes.margins(y=0.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name == headline.key and headline.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _short(name: str, limit: int = 24) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
