"""The tasks, single-label and multi-label classification, one module each. Register a new one in `TASKS`. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.errors import InvalidInput, did_you_mean
from finetune.tasks.multiclass import Multiclass
from finetune.tasks.multilabel import NO_LABEL, Multilabel
from finetune.tasks.task import Target, Task

TASKS: tuple[Task, ...] = (Multiclass(), Multilabel())


def task_named(name: str) -> Task:
    """Return the task of this name.

    Raises:
        InvalidInput: there is none; the message lists the existing ones.
    """
    for task in TASKS:
        if task.name == name:
            return task
    names = [task.name for task in TASKS]
    raise InvalidInput(f"no task {name!r}; tasks are {', '.join(names)}.{did_you_mean(name, names)}")


def task_of(targets: Sequence[Target]) -> Task:
    """Return the task that fits these targets: multilabel if any of them is a tuple of labels."""
    return next(task for task in TASKS if task.is_task_of(targets))


__all__ = ["NO_LABEL", "TASKS", "Target", "Task", "task_named", "task_of"]
