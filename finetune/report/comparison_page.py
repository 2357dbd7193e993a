"""The page of a comparison, one self-contained file: the verdict, its evidence, and disputed images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.metrics import Metric
from finetune.report import comparison_figures as figures
from finetune.report.pictures import data_uri, thumbnail
from finetune.report.templates import render
from finetune.tasks import TASKS
from finetune.tasks.leading import WHY_OVER_CLASSES


@dataclass(frozen=True)
class Disputed:
    """An image that one arm predicts correctly and another does not."""

    image: NDArray[np.uint8]  # (h, w, 3) RGB, as preprocessed for a model
    file: str
    true: str
    answers: tuple[tuple[str, str, float, bytes | None], ...]  # arm, label, its probability, class activation map as PNG


@dataclass(frozen=True)
class ComparisonPage:
    """The data of the page."""

    document: Mapping[str, Any]  # the content of ``comparison.json``
    metrics: Sequence[Metric[Any]]  # of the task, the headline first
    curves: Mapping[str, Sequence[Mapping[str, Any]]]  # arm -> lines of the journal of its first run
    disputed: Sequence[Disputed]
    command: str  # the command that repeats the comparison
    class_counts: Sequence[int]  # test images of each class


def render_comparison(page: ComparisonPage) -> str:
    """Return the page as one HTML document."""
    document, headline = page.document, page.metrics[0]
    split, key = document["split"], document["headline"]
    arms = document["arms"]
    leading = next((metric for metric in page.metrics[1:] if document["leading"] == f"{split}/{metric.key}"), None)
    drawn = {
        "forest": figures.forest(document["pairs"], key, document["verdict"]["margin"], headline),
        "cost": figures.cost_against_quality(arms, key, headline, document["verdict"]["pareto"]),
        "classes": figures.class_recalls(arms, document["classes"], page.class_counts),
        "curves": figures.curves(page.curves, headline),
    }
    return render(
        "comparison.html",
        document=document,
        headline=headline,
        metrics=page.metrics,
        leading=leading,
        why_leading=WHY_OVER_CLASSES[0].upper() + WHY_OVER_CLASSES[1:],
        others_shown=[metric for metric in page.metrics[1:] if metric is not leading],
        split=split,
        key=key,
        arms=arms,
        pairs=[pair for pair in document["pairs"] if pair["metric"] == key],
        others=[pair for pair in document["pairs"] if pair["metric"] != key],
        drawings={name: data_uri(svg.encode(), "image/svg+xml") for name, svg in drawn.items() if svg is not None},
        disputed=[
            {
                "thumbnail": data_uri(thumbnail(one.image), "image/jpeg"),
                "file": one.file,
                "true": one.true,
                "answers": [
                    {
                        "arm": arm,
                        "label": label,
                        "probability": probability,
                        "right": label == one.true,
                        "map": None if png is None else data_uri(png, "image/png"),
                    }
                    for arm, label, probability, png in one.answers
                ],
            }
            for one in page.disputed
        ],
        command=page.command,
    )


def notebook_view(document: Mapping[str, Any]) -> str:
    """Return the verdict and the table of arms as HTML for a notebook."""
    key, split = document["headline"], document["split"]
    metric = next(m for task in TASKS for m in task.metrics if f"{split}/{m.key}" == key)
    svg = figures.forest(document["pairs"], key, document["verdict"]["margin"], metric)
    return render(
        "notebook_comparison.html",
        document=document,
        arms=document["arms"],
        key=key,
        headline=metric,
        leading=next((m for task in TASKS for m in task.metrics if key != document["leading"] == f"{split}/{m.key}"), None),
        forest=data_uri(svg.encode(), "image/svg+xml"),
    )
