"""Shared views for MLflow's pages: selected columns and charts of the runs table, which links open by a key.

MLflow stores a shared view as JSON in a tag of the experiment, and ignores keys that it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

VIEW_TAG = "mlflow.sharedViewState."  # followed by the key that links pass as viewStateShareKey
EXPERIMENT_VIEW = "finetune"  # the key of the view of all runs of an experiment

_PARAMS = ("method", "backbone", "seed")
_COSTS = ("train_seconds", "latency_ms", "bundle_mib")
_RUN_NAME = "attributes.`Run Name`"
_NAME_WIDTH_PX, _WIDTH_PX = 240, 105


def experiment_view(headline: str | None) -> str:
    """Return the view of all runs of an experiment: headline metric, number of images, and costs."""
    return json.dumps({**_table(headline), "runsHiddenMode": "FIRST_20_RUNS"})


def study_view(run_id: str, headline: str | None, group_by_tag: str | None = None) -> str:
    """Return the view of the runs of one study, best first.

    Args:
        group_by_tag: runs with the same value of this tag are shown as their mean.
    """
    view: dict[str, Any] = {
        **_table(headline),
        "searchFilter": f"tags.mlflow.parentRunId = '{run_id}'",
        "runsHiddenMode": "SHOW_ALL",
    }
    if headline is not None:
        view |= {"orderByKey": _column("metrics", headline), "orderByAsc": False}
    if group_by_tag is not None:
        view["groupBy"] = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": group_by_tag}]}
    return json.dumps(view)


def _table(headline: str | None) -> dict[str, Any]:
    figures: Sequence[str] = ()
    if headline is not None:
        split, _, metric = headline.partition("/")
        figures = (headline, f"{headline}_low", f"{headline}_high", f"{split}/n", *([f"val/{metric}"] if split != "val" else []))
    columns = [
        *(_column("metrics", name) for name in (*figures, *_COSTS)),
        *(_column("params", name) for name in _PARAMS),
    ]
    widths = {_RUN_NAME: _NAME_WIDTH_PX, **dict.fromkeys(columns, _WIDTH_PX)}
    return {"selectedColumns": columns, "columnOrder": [_RUN_NAME, *columns], "columnWidths": widths}


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"
