"""The query strategy of each task, by the task's name. One module for each task. Torch-free."""

from __future__ import annotations

from finetune.labelling.queries.multiclass import MulticlassQuery
from finetune.labelling.queries.multilabel import MultilabelQuery
from finetune.labelling.queries.query import Query

QUERIES: tuple[Query, ...] = (MulticlassQuery(), MultilabelQuery())


def query_of(task: str) -> Query:
    """Return the query strategy of the task with this name; every task in `finetune.tasks` has one."""
    return next(query for query in QUERIES if query.task == task)


__all__ = ["QUERIES", "Query", "query_of"]
