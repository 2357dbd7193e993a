"""Choose the cut between the cached prefix and the rest of the network, and estimate its cost, before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune.data.dataset import Sample
from finetune.features.engine import GraphSource
from finetune.features.prefix import ClassifierPrefix
from finetune.features.rows import FeatureContext, FrozenRows, RowType, Views
from finetune.model.classifier import Classifier
from finetune.model.cut import why_not_cut


@dataclass(frozen=True)
class PrefixPlan:
    """The activations that will be cached, and their cost: a line of ``finetune check``."""

    stage: int | None  # the cut is before this stage; None: nothing is cached
    after: str  # name of the last stage before the cut
    row_shape: tuple[int, ...]
    dtype: RowType
    views: int  # per training image; fewer than requested if the cache has no room for all
    n_rows: int
    n_missing: int  # rows that are not in the cache yet
    n_bytes: int  # of all rows
    seconds: float | None  # to compute the missing rows; None if it was not measured
    rows_per_second: float | None
    engine: str
    reason: str

    def __str__(self) -> str:
        if self.stage is None:
            return f"no features are cached: {self.reason}"
        shape = "×".join(map(str, self.row_shape))
        text = f"{self.n_rows:,} outputs of {self.after} ({shape} {self.dtype}, {self.n_bytes / 1e6:,.1f} MB)"
        if not self.n_missing:
            return f"{text}, all in the cache"
        text += f", {self.n_missing:,} still to compute with {self.engine}"
        if self.seconds is None or self.rows_per_second is None:
            return text
        return f"{text}, about {self.seconds:,.0f} s at {self.rows_per_second:,.0f} images/s"


def plan_prefix(
    classifier: Classifier,
    first_trainable: int,
    train: Sequence[Sample],
    val: Sequence[Sample],
    views: Views,
    context: FeatureContext,
    *,
    graph: GraphSource | None = None,
    measure: bool = True,
) -> PrefixPlan:
    """Choose the cut for a run, and estimate its cost.

    The best cut is directly before the first trainable stage, because frozen stages after the cut run again in every epoch. If
    that cut is not possible, or its rows do not fit into the cache, lower cuts are tried, and then fewer views.

    Args:
        first_trainable: index of the first trainable stage; the number of stages if only the head trains.
        graph: returns the exported classifier, if it has been exported already.
        measure: time a few images with the engine that will be used, which is exported for that if necessary.
    """
    stages = classifier.backbone.stages
    dtype: RowType = "float32" if first_trainable == len(stages) else "float16"
    at_or_below = range(first_trainable, 0, -1)
    cuts = [stage for stage in at_or_below if not why_not_cut(classifier.backbone, stage)]
    for count in _halvings(views.count):
        for stage in cuts:
            prefix = ClassifierPrefix(classifier, stage, graph)
            of_train = FrozenRows(prefix, dtype, train, replace(views, count=count), context)
            if len(of_train.keys) * of_train.cache.row_bytes > context.store.budget_bytes:
                continue
            rate = of_train.rows_per_second() if measure else None
            of_val = FrozenRows(prefix, dtype, val, replace(views, count=1), context)
            n_missing, n_rows = of_train.n_missing + of_val.n_missing, len(of_train.keys) + len(of_val.keys)
            return PrefixPlan(
                stage=stage,
                after=stages[stage - 1].name,
                row_shape=prefix.row_shape,
                dtype=dtype,
                views=count,
                n_rows=n_rows,
                n_missing=n_missing,
                n_bytes=n_rows * of_train.cache.row_bytes,
                seconds=0.0 if not n_missing else n_missing / rate if rate else None,
                rows_per_second=rate,
                engine=of_train.engine_name,
                reason="" if count == views.count else f"{views.count} views do not fit the cache",
            )
    if not at_or_below:
        reason = "the first stage trains"
    else:
        reason = "no cut fits into the cache" if cuts else why_not_cut(classifier.backbone, first_trainable)
    return PrefixPlan(None, "", (), dtype, views.count, 0, 0, 0, None, None, "", reason)


def _halvings(count: int) -> list[int]:
    return [count] if count == 1 else [count, *_halvings(count // 2)]
