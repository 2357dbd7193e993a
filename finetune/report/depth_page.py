"""The page of a depth study, one self-contained file: conclusions in words, figures, and a table of all results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.report import depth_figures as figures
from finetune.report.pictures import data_uri
from finetune.report.templates import render

CAPTIONS = {
    "depth": "Training error (filled, with two standard errors) and validation error (hollow) against the number of layers.",
    "courses": "Training error by epoch, while training; the heavier the line, the deeper the network.",
    "gradients": "Gradient norm over weight norm in each block of the deepest networks, early in training. Shaded: ordinary.",
}


def render_depth(document: Mapping[str, Any], command: str) -> str:
    """Return the page as one HTML document.

    Args:
        document: the content of ``depth.json``.
        command: the command that repeats the study.
    """
    networks = document["networks"]
    drawn = {
        "depth": figures.error_by_depth(networks),
        "gradients": figures.gradients(networks),
        "courses": figures.courses(networks),
    }
    shown = [
        {"uri": data_uri(svg.encode(), "image/svg+xml"), "caption": CAPTIONS[name], "wide": False}
        for name, svg in drawn.items()
        if svg is not None
    ]
    return render("depth.html", document=document, figures=shown, command=command, rows=[_row(one) for one in networks])


def _row(one: Mapping[str, Any]) -> list[str]:
    gain = one["gradient_decades"]
    gradient = f"10^{gain:+.1f}" if gain is not None else "zero" if one["gradients"] else "–"
    return [
        one["name"],
        f"{one['parameters']:,}",
        f"{one['train_error']:.1%} ± {100 * one['train_error_se']:.1f}",
        f"{one['val_error']:.1%}",
        gradient,
        f"{one['seconds']:.0f} s",
        ", ".join(code.replace("_", " ") for code in one["findings"]) or "nothing wrong",
    ]
