"""The query strategy of each task, by the task's name. One module for each task. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from finetune.labelling.queries.multiclass import MulticlassQuery
from finetune.labelling.queries.multilabel import MultilabelQuery
from finetune.labelling.queries.query import Query

QUERIES: Mapping[str, Query] = {"multiclass": MulticlassQuery(), "multilabel": MultilabelQuery()}


def query_of(task: str) -> Query:
    """Return the query strategy of the task with this name; every task in `finetune.tasks` has one."""
    return QUERIES[task]


__all__ = ["QUERIES", "Query", "query_of"]
