"""Repeat predictions with a shadow model when a thread is free, and count and log disagreements."""

from __future__ import annotations

import asyncio
import logging

from finetune.bundle.image_limits import ImageLimits
from finetune.errors import FinetuneError
from service.admission import WorkQueue
from service.metrics import Metrics
from service.models import LoadedModel
from service.predictions import Upload, predict
from service.schemas.predictions import PredictionAnswer

log = logging.getLogger(__name__)


class Shadows:
    """The shadow comparisons of one server. They are skipped while predictions wait, so that they never delay a response."""

    def __init__(self, queue: WorkQueue, metrics: Metrics, limits: ImageLimits) -> None:
        self._queue = queue
        self._metrics = metrics
        self._limits = limits
        self._running: set[asyncio.Task[None]] = set()

    def compare(self, shadow: LoadedModel, upload: Upload, answer: PredictionAnswer) -> None:
        """Start a comparison in the background, if a thread is free."""
        if self._queue.is_busy:
            self._count(shadow, "skipped")
            return
        task = asyncio.create_task(self._compare(shadow, upload, answer))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _compare(self, shadow: LoadedModel, upload: Upload, answer: PredictionAnswer) -> None:
        try:
            second = await self._queue.run(predict, shadow, upload, self._limits)
        except FinetuneError as error:
            log.warning("the shadow %s failed: %s", shadow, error)
            self._count(shadow, "failed")
            return
        first_label, second_label = answer.predictions[0], second.predictions[0]
        agrees = (first_label.label, answer.labels) == (second_label.label, second.labels)
        if answer.labels is not None:  # a multi-label model: compare the predicted labels
            agrees = sorted(answer.labels) == sorted(second.labels or ())
        self._count(shadow, "agrees" if agrees else "differs")
        if not agrees:
            log.info(
                "%s@%s answered %r (%.3f), the shadow %s %r (%.3f)",
                *(answer.model, answer.version, first_label.label, first_label.probability),
                *(shadow, second_label.label, second_label.probability),
            )

    def _count(self, shadow: LoadedModel, outcome: str) -> None:
        self._metrics.shadowed(shadow.name, shadow.version, outcome)
