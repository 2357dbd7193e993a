"""The page of a labels study, one self-contained file: the conclusion, the learning curve, and the projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.report.labels_figures import learning_curve
from finetune.report.pictures import data_uri
from finetune.report.templates import render


def render_labels(
    document: Mapping[str, Any],
    course: Sequence[Mapping[str, float]],
    label: str,
    projected: Sequence[Sequence[str]],
    command: str,
    more_label: str,
    labels: Sequence[str],
) -> str:
    """Return the page as one HTML document.

    Args:
        document: from `LabelsStudy.to_dict`.
        course: points of the fitted curve, see `finetune.report.labels_figures`.
        label: the metric's display name.
        projected: the rows of the table of projections.
        command: the command that repeats the study.
        more_label: heading of the numbers of additional images.
        labels: the display names of all measured metrics, in the order of the document's curves.
    """
    curve = document["curves"][document["metric"]]
    svg = learning_curve(curve, course, document["projections"], label)
    measured = [
        [
            f"{n:,}",
            *(f"{one['value'][place]:.1%} ± {100 * one['standard_error'][place]:.1f}" for one in document["curves"].values()),
        ]
        for place, n in enumerate(curve["n_train"])
    ]
    figure = {
        "uri": data_uri(svg.encode(), "image/svg+xml"),
        "wide": False,
        "caption": "Filled: measured on images that were held out, with two standard errors. Line and hollow points: what all "
        "learning curves that agree with them expect, with the 95 % interval. Right of the dotted line nothing was measured.",
    }
    counts = sorted(document["classes"].items(), key=lambda pair: pair[1])
    return render(
        "labels.html",
        document=document,
        label=label,
        figure=figure,
        projected=projected,
        measured=measured,
        counts=[[name, f"{count:,}"] for name, count in counts],
        command=command,
        more_label=more_label,
        labels=list(labels),
    )
