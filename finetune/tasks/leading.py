"""Which metric is reported first, from recorded ``split/name`` figures of bundles, MLflow and jobs. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.metrics import Metric
from finetune.tasks.task import Task

WHY_OVER_CLASSES = (
    "the mean over classes comes first because the largest class has five times the images of the smallest, or more"
)


def recorded_leading(task: Task, figures: Mapping[str, Any], split: str) -> Metric[Any]:
    """Return the metric that the evaluation reported first when these figures were recorded.

    An evaluation records the interval of its headline and, if its leading metric is another one, also that metric's interval.
    """
    others = (metric for metric in task.metrics if metric is not task.headline and f"{split}/{metric.key}_low" in figures)
    return next(others, task.headline)


def leading_first(task: Task, leading: Metric[Any]) -> list[Metric[Any]]:
    """Return the task's metrics in the order of display: `leading`, then the others in the task's order."""
    return [leading, *(metric for metric in task.metrics if metric is not leading)]
