"""The server's metrics for Prometheus, with labels of bounded cardinality.

The `route` label is the template of the route (``/v1/models/{name}/predict``), never the requested path, and ``unmatched`` if no
route matches; the `model` label is a registered name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Protocol, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from finetune.errors import NotReady
from finetune.monitoring.drift import Drift

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
UNMATCHED = "unmatched"
_Labelled = TypeVar("_Labelled", Counter, Histogram)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

disable_created_metrics()  # a second series for each counter, with its time of creation only


class Metrics:
    """The metrics of one server, in their own Prometheus registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.requests = Counter("finetune_requests", "Answered requests", ["route", "method", "status"], registry=self.registry)
        self.seconds = Histogram(
            "finetune_request_seconds",
            "Seconds from the headers of a request to the end of its response",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("finetune_requests_in_flight", "Requests being answered", registry=self.registry)
        self.predictions = Counter(
            "finetune_predictions",
            "Classified images, by role of the model: the default, its canary, or named in the request",
            ["model", "version", "role"],
            registry=self.registry,
        )

        self.stage_seconds = Histogram(
            "finetune_prediction_seconds",
            "Seconds of the stages of a prediction, by model: decode, preprocess (resizing), run (ONNX Runtime)",
            ["model", "stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.sampled_inputs = Counter(
            "finetune_sampled_inputs", "Images that were sampled for storing, by outcome", ["outcome"], registry=self.registry
        )
        self.shadow_answers = Counter(
            "finetune_shadow_answers",
            "Predictions that a shadow model repeats, by outcome: whether the labels agree, or why it did not predict",
            ["model", "version", "outcome"],
            registry=self.registry,
        )

        self._series: set[tuple[Counter | Histogram, tuple[str, ...]]] = set()  # those of models; their first label is the model
        self._exists: Callable[[str, str | None], bool] = lambda _model, _version: True

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a response and its duration."""
        known_method = method if method in METHODS else "other"
        self.requests.labels(route, known_method, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def predicted(self, model: str, version: str, role: str, n_images: int) -> None:
        """Count predicted images of a model."""
        self._of_model(self.predictions, model, version, role).inc(n_images)

    def took(self, model: str, stages: Mapping[str, float]) -> None:
        """Count the seconds that each stage of one prediction took."""
        for stage, seconds in stages.items():
            self._of_model(self.stage_seconds, model, stage).observe(seconds)

    def shadowed(self, model: str, version: str, outcome: str) -> None:
        """Count an answer of a shadow model."""
        self._of_model(self.shadow_answers, model, version, outcome).inc()

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Add a gauge of the predictions that run or wait."""
        gauge = Gauge("finetune_predictions_waiting", "Predictions that run or wait for a thread", registry=self.registry)
        gauge.set_function(waiting)

    def watch_models(self, models: WatchedModels) -> None:
        """Add metrics of the loaded models. They are collected at each scrape, so that removed versions leave no series."""
        self._exists = models.exists
        self.registry.register(_ModelsCollector(models))

    def watch_drift(self, last_found: Callable[[], Iterable[tuple[str, str, Drift]]]) -> None:
        """Add metrics of the last drift test of each version."""
        self.registry.register(_DriftCollector(last_found))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format, without those of models that were deleted."""
        for metric, labels in tuple(self._series):
            if not self._exists(labels[0], None if metric is self.stage_seconds else labels[1]):
                self._series.discard((metric, labels))
                with contextlib.suppress(KeyError):  # another scrape has removed it
                    metric.remove(*labels)
        return generate_latest(self.registry)

    def _of_model(self, metric: _Labelled, *labels: str) -> _Labelled:
        self._series.add((metric, labels))
        return metric.labels(*labels)


class WatchedModels(Protocol):
    """The view of the loaded models that the metrics need."""

    swaps: int

    def default(self) -> _Named: ...

    def loaded(self) -> Iterable[tuple[str, str]]: ...

    def refused(self) -> Sized: ...

    def exists(self, name: str, version: str | None) -> bool: ...


class _Named(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...


class _ModelsCollector(Collector):
    def __init__(self, models: WatchedModels) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        default = GaugeMetricFamily(
            "finetune_default_model", "The model for requests without a model name", labels=["model", "version"]
        )
        with contextlib.suppress(NotReady):
            model = self._models.default()
            default.add_metric([model.name, model.version], 1)
        yield default
        loaded = GaugeMetricFamily("finetune_model_loaded", "Models in memory", labels=["model", "version"])
        for name, version in sorted(set(self._models.loaded())):
            loaded.add_metric([name, version], 1)
        yield loaded
        yield CounterMetricFamily("finetune_model_swaps", "Loaded models replaced by another version", value=self._models.swaps)
        yield GaugeMetricFamily(
            "finetune_model_refused", "Bundles that failed their checks and are not served", value=len(self._models.refused())
        )


class _DriftCollector(Collector):
    def __init__(self, last_found: Callable[[], Iterable[tuple[str, str, Drift]]]) -> None:
        self._last_found = last_found

    def collect(self) -> Iterable[Metric]:
        drifted = GaugeMetricFamily(
            "finetune_drift",
            "Whether predictions in production have drifted from those for held-out images: 1 yes, 0 no; absent if not known",
            labels=["model", "version"],
        )
        images = GaugeMetricFamily(
            "finetune_drift_images", "Number of compared images in production", labels=["model", "version"]
        )
        labels = ["model", "version", "test"]
        p = GaugeMetricFamily("finetune_drift_adjusted_p", "p-value of a test, adjusted for their number", labels=labels)
        effect = GaugeMetricFamily("finetune_drift_effect", "Effect size of a test", labels=labels)
        for name, version, found in sorted(self._last_found(), key=lambda one: one[:2]):
            images.add_metric([name, version], found.n)
            if found.tests:
                drifted.add_metric([name, version], found.state == "drifted")
            for test in found.tests:
                p.add_metric([name, version, test.name], test.adjusted_p)
                effect.add_metric([name, version, test.name], test.effect)
        yield from (drifted, images, p, effect)
