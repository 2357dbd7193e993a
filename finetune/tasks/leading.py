"""Which figure is told first, where figures were recorded under ``split/name``: bundles, MLflow, a job's metrics. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.metrics import Metric
from finetune.tasks.task import Task

WHY_OVER_CLASSES = (
    "the mean over classes comes first because the largest class has five times the images of the smallest, or more"
)


def recorded_leading(task: Task, figures: Mapping[str, Any], split: str) -> Metric[Any]:
    """Return the metric that was told first when these figures were recorded.

    An evaluation records the interval of its headline, and beside it that of its leading metric where this is another one.
    """
    others = (metric for metric in task.metrics if metric is not task.headline and f"{split}/{metric.key}_low" in figures)
    return next(others, task.headline)


def leading_first(task: Task, leading: Metric[Any]) -> list[Metric[Any]]:
    """Return the task's metrics in the order in which they are shown: the leading one, then the others as the task lists them."""
    return [leading, *(metric for metric in task.metrics if metric is not leading)]
