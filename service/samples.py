"""Store a fraction of the images of prediction requests, if the operator has enabled it, in a background thread."""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.bundle.registry import Registry
from finetune.errors import FinetuneError
from finetune.monitoring.samples import SampleStore, SamplingPolicy
from service.metrics import Metrics
from service.models import LoadedModel

log = logging.getLogger(__name__)

ENFORCE_SECONDS = 60.0
MAX_WAITING_BYTES = 64 << 20


@dataclass(frozen=True)
class _SelectedImage:
    name: str
    version: str
    data: bytes
    record: Mapping[str, Any]
    at: float


class InputSampler:
    """Draws images at random and stores them in a background thread, limited by the policy."""

    def __init__(
        self, registry: Registry, policy: SamplingPolicy, metrics: Metrics, enforce_seconds: float = ENFORCE_SECONDS
    ) -> None:
        self.fraction = policy.fraction
        self._registry = registry
        self._store = SampleStore(registry, policy)
        self._metrics = metrics
        self._enforce_seconds = enforce_seconds
        self._selected: queue.SimpleQueue[_SelectedImage | None] = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._counting = threading.Lock()  # protects `_waiting_bytes`
        self._thread = threading.Thread(target=self._write, name="samples", daemon=True)

    def start(self) -> None:
        """Start the background thread, which also deletes samples that exceed the policy."""
        self._thread.start()

    def stop(self) -> None:
        """Write the queued images and stop the background thread."""
        self._selected.put(None)
        self._thread.join()

    def selects(self, model: LoadedModel) -> bool:
        """Draw at random whether to store an image; False for a bundle outside the registry, which has no folder for it."""
        if self.fraction == 0.0 or random.random() >= self.fraction:
            return False
        return model.bundle.path == self._registry.root / model.name / model.version

    def submit(self, model: LoadedModel, data: bytes, record: Mapping[str, Any]) -> None:
        """Queue a drawn image for storing; drop it if too many bytes are queued."""
        with self._counting:
            if self._waiting_bytes + len(data) > MAX_WAITING_BYTES:
                self._metrics.sampled_inputs.labels("dropped").inc()
                return
            self._waiting_bytes += len(data)
        self._selected.put(_SelectedImage(model.name, model.version, data, record, time.time()))

    def _write(self) -> None:
        enforce_at, trouble = time.monotonic(), ""
        while True:
            try:
                if time.monotonic() >= enforce_at:
                    enforce_at = time.monotonic() + self._enforce_seconds
                    self._store.enforce(time.time())
                drawn = self._selected.get(timeout=max(0.01, enforce_at - time.monotonic()))
                if drawn is None:
                    return
                self._keep(drawn)
            except queue.Empty:
                continue
            except (OSError, FinetuneError) as error:  # must not stop predictions
                if str(error) != trouble:
                    log.error("inputs cannot be sampled: %s", error)
                trouble = str(error)

    def _keep(self, drawn: _SelectedImage) -> None:
        with self._counting:
            self._waiting_bytes -= len(drawn.data)
        kept = self._store.keep(drawn.name, drawn.version, drawn.data, drawn.record, drawn.at)
        self._metrics.sampled_inputs.labels("kept" if kept else "dropped").inc()
