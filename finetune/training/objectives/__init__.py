"""The training objective of each task: its loss and link function in torch. One module for each task."""

from __future__ import annotations

from finetune.training.objectives.multiclass import MulticlassObjective
from finetune.training.objectives.multilabel import MultilabelObjective
from finetune.training.objectives.objective import Objective

OBJECTIVES: tuple[Objective, ...] = (MulticlassObjective(), MultilabelObjective())


def objective_of(task: str) -> Objective:
    """Return the objective of the task with this name; every task in `finetune.tasks` has one."""
    return next(objective for objective in OBJECTIVES if objective.task == task)


__all__ = ["OBJECTIVES", "Objective", "objective_of"]
