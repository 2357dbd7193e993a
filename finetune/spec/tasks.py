"""The tasks and their losses by name, with what the job spec says of them. What a task does is in `finetune.tasks`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

TaskName = Literal["multiclass", "multilabel"]
LossName = Literal["cross_entropy", "binary_cross_entropy", "asymmetric"]

TASK_MEANINGS: Mapping[TaskName, str] = {
    "multiclass": "exactly one label per image",
    "multilabel": "several labels, or none",
}
LOSSES: Mapping[str, tuple[LossName, ...]] = {
    "multiclass": ("cross_entropy",),
    "multilabel": ("binary_cross_entropy", "asymmetric"),
}
"""The losses that training can minimise, by task, the default first."""

LOSS_MEANINGS = "cross_entropy for one label per image, binary_cross_entropy (the default) or asymmetric for several"
NOT_CONVEX: frozenset[LossName] = frozenset({"asymmetric"})
"""The losses for which no head can be solved."""
