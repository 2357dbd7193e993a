"""The figures of a depth study: error against depth, training curves, gradients by block.

Plain and residual networks are distinguished by colour, marker and line style. The colours are those of Okabe & Ito (2008), which
are safe for colour-blind readers; markers and line styles also remain in prints without colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from finetune.report.figures import FAINT, INK, WIDTH_INCHES, styled, to_svg

STYLES: Mapping[str, Mapping[str, Any]] = {
    "plain": {"color": "#d55e00", "marker": "s", "linestyle": "-"},
    "residual": {"color": "#0072b2", "marker": "o", "linestyle": "--"},
}
AID_TITLES = {"none": "default initialisation", "he": "He initialisation", "bn": "batch normalisation"}
CHANCE_MARGIN = 1.05
ZERO_DECADE = -14.0  # where gradients of exactly zero are drawn

Networks = Sequence[Mapping[str, Any]]


def error_by_depth(networks: Networks) -> str:
    """Draw training error (filled) and validation error (hollow) against depth, one panel per aid."""
    return to_svg(_error_by_depth(networks))


def courses(networks: Networks) -> str:
    """Draw the training error by epoch, one panel per kind and aid, deeper networks in heavier lines."""
    return to_svg(_courses(networks))


def gradients(networks: Networks) -> str | None:
    """Draw gradient norm over weight norm by block for the deepest networks, one panel per aid; None if not measured."""
    deepest = max(one["depth"] for one in networks)
    drawn = [one for one in networks if one["depth"] == deepest and one["gradients"]]
    return to_svg(_gradients(drawn)) if drawn else None


def _aids(networks: Networks) -> list[str]:
    return list(dict.fromkeys(one["aid"] for one in networks))


def _panels(figure: Figure, n: int) -> list[Axes]:
    found = figure.subplots(1, n, sharey=True, squeeze=False)
    return list(found[0])


@styled
def _error_by_depth(networks: Networks) -> Figure:
    aids = _aids(networks)
    figure = Figure(figsize=(WIDTH_INCHES, 3.4))
    for axes, aid in zip(_panels(figure, len(aids)), aids, strict=True):
        for kind, style in STYLES.items():
            family = [one for one in networks if (one["kind"], one["aid"]) == (kind, aid)]
            if not family:
                continue
            depths = [one["depth"] for one in family]
            errors, spread = [one["train_error"] for one in family], [2 * one["train_error_se"] for one in family]
            axes.errorbar(depths, errors, yerr=spread, capsize=2, markersize=6, label=f"{kind}, training", **style)
            axes.plot(
                depths, [one["val_error"] for one in family], color=style["color"], marker=style["marker"], markersize=6,
                markerfacecolor="none", linestyle=":", linewidth=1.0, label=f"{kind}, validation",
            )  # fmt: skip
        axes.set(title=AID_TITLES[aid], xlabel="layers", ylim=(-0.03, CHANCE_MARGIN))
        axes.set_xticks(sorted({one["depth"] for one in networks}))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if aid == aids[0]:
            axes.set_ylabel("images predicted wrongly")
            legend = axes.get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=4)
    return figure


@styled
def _courses(networks: Networks) -> Figure:
    aids, kinds = _aids(networks), [kind for kind in STYLES if any(one["kind"] == kind for one in networks)]
    depths = sorted({one["depth"] for one in networks})
    figure = Figure(figsize=(WIDTH_INCHES, 2.3 * len(kinds) + 0.5))
    panels = figure.subplots(len(kinds), len(aids), sharex=True, sharey=True, squeeze=False)
    for row, kind in enumerate(kinds):
        for column, aid in enumerate(aids):
            axes = panels[row][column]
            family = [one for one in networks if (one["kind"], one["aid"]) == (kind, aid)]
            for one in family:
                place = depths.index(one["depth"]) / max(len(depths) - 1, 1)
                epochs, errors = zip(*one["errors"], strict=True) if one["errors"] else ((), ())
                axes.plot(
                    epochs, errors, color=STYLES[kind]["color"], linewidth=0.9 + 2.1 * place, alpha=0.45 + 0.55 * place,
                    linestyle=("-", "--", "-.", ":")[(len(depths) - 1 - depths.index(one["depth"])) % 4],
                    label=f"{one['depth']} layers",
                )  # fmt: skip
            axes.set(title=f"{kind}, {AID_TITLES[aid]}", ylim=(-0.03, CHANCE_MARGIN))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            if row == len(kinds) - 1:
                axes.set_xlabel("epoch")
            if column == 0:
                axes.set_ylabel("training error")
            if column == len(aids) - 1:
                axes.legend(loc="upper right", fontsize=8, handlelength=3)
    return figure


@styled
def _gradients(networks: Networks) -> Figure:
    aids = _aids(networks)
    figure = Figure(figsize=(WIDTH_INCHES, 3.2))
    for axes, aid in zip(_panels(figure, len(aids)), aids, strict=True):
        for one in (one for one in networks if one["aid"] == aid):
            style = STYLES[one["kind"]]
            values = [math.log10(value) if value > 0 else ZERO_DECADE for value in one["gradients"]]
            lost = [(block, value) for block, value in enumerate(values) if value <= ZERO_DECADE]
            axes.plot(range(len(values)), values, markersize=4, label=one["kind"], **style)
            if lost:
                axes.plot(*zip(*lost, strict=True), "x", color=INK, markersize=5)
                axes.annotate("exactly zero", (lost[0][0], ZERO_DECADE), xytext=(4, 6), textcoords="offset points", color=INK)
        axes.set(title=f"{AID_TITLES[aid]}, {networks[0]['depth']} layers", xlabel="block, from the stem up")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"1e{value:.0f}"))
        axes.axhspan(-5, -1, color=FAINT, alpha=0.08, linewidth=0)
        if aid == aids[0]:
            axes.set_ylabel("gradient norm ÷ weight norm")
            legend = axes.get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=2)
    return figure
