"""The figure of a labels study: accuracy against the number of training images, with the extrapolated curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from finetune.report.figures import FAINT, INK, VAL, WIDTH_INCHES, styled, to_svg

Course = Sequence[Mapping[str, float]]  # n_train, value, low, high: points of the fitted curve


def learning_curve(curve: Mapping[str, Any], course: Course, projections: Sequence[Mapping[str, Any]], label: str) -> str:
    """Draw the measured accuracies ± two standard errors, and the fitted curve with its interval up to the last projection."""
    return to_svg(_learning_curve(curve, course, projections, label))


@styled
def _learning_curve(curve: Mapping[str, Any], course: Course, projections: Sequence[Mapping[str, Any]], label: str) -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, 3.8))
    axes = figure.subplots()
    sizes = [point["n_train"] for point in course]
    axes.fill_between(sizes, [p["low"] for p in course], [p["high"] for p in course], color=VAL, alpha=0.15, linewidth=0)
    measured = curve["n_train"][-1]
    for until, style in ((True, "-"), (False, "--")):
        part = [point for point in course if (point["n_train"] <= measured if until else point["n_train"] >= measured)]
        axes.plot([p["n_train"] for p in part], [p["value"] for p in part], style, color=VAL)
    errors = 2 * np.array(curve["standard_error"])
    axes.errorbar(curve["n_train"], curve["value"], yerr=errors, fmt="o", color=INK, markersize=5, capsize=3, label="measured")
    for one in projections:
        value = one["value"]
        axes.errorbar(
            [one["n_train"]],
            [value["value"]],
            yerr=[[max(value["value"] - value["low"], 0)], [max(value["high"] - value["value"], 0)]],
            fmt="o",
            markerfacecolor="none",
            color=VAL,
            capsize=3,
            label="expected" if one is projections[0] else None,
        )
    axes.axvline(measured, color=FAINT, linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="training images", title=label[0].upper() + label[1:])
    axes.set_xticks([*curve["n_train"], projections[-1]["n_train"]])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(loc="lower right")
    return figure
