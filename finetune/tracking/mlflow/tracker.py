"""The MLflow tracker: params, metrics, datasets, files, a Markdown description, and the bundle as a model.

How MLflow's pages display a metric depends on how it is logged: a metric with a single value at step 0 becomes a bar chart over
runs, and the part of the key before the last slash is the section of its chart. Therefore final figures and costs are logged
once, at step 0, under plain names (``test/top1``, ``train_seconds``), and the history of training under ``train/…``, where
``val/loss`` of an epoch becomes ``train/val_loss``. No key is used for both.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.storage.workspace import Workspace
from finetune.tracking.mlflow.connection import Destination, connect, destination_of
from finetune.tracking.mlflow.model import log_model
from finetune.tracking.mlflow.names import key_text, metric_key, value_text
from finetune.tracking.mlflow.registry import synchronise
from finetune.tracking.mlflow.system import SystemSampler
from finetune.tracking.mlflow.views import EXPERIMENT_VIEW, VIEW_TAG, experiment_view, study_view
from finetune.tracking.tracker import Place, Point
from finetune.tracking.view import ARM_TAG, COMPARISON, RunView, SplitView

RUN_KEY = "finetune.run_key"
DESCRIPTION = "mlflow.note.content"
# Makes MLflow's pages open an experiment with its runs and charts instead of with traces of language models.
EXPERIMENT_KIND = {"mlflow.experimentKind": "custom_model_development"}
MOST_METRICS, MOST_PARAMS, MOST_TAGS = 1000, 100, 100  # in one call
DIGEST_CHARACTERS = 36
DATASET_SCHEMA = {
    "mlflow_colspec": [
        {"name": "image", "type": "binary", "required": True},
        {"name": "label", "type": "string", "required": True},
    ]
}


def open_tracker(destination: str | None, workspace: Workspace) -> MlflowTracker:
    """Connect to MLflow at the URI `destination`, or at the default of `destination_of`."""
    target = destination_of(workspace, destination)
    return MlflowTracker(connect(target), target, workspace)


@dataclass
class _Known:
    """What MLflow already has of one run, to avoid redundant requests."""

    experiment_id: str
    name: str
    status: str
    parent: str | None
    params: dict[str, str]
    tags: dict[str, str]
    datasets: set[str] = field(default_factory=set)
    has_metrics: bool = False


class MlflowTracker:
    """One connection to MLflow."""

    def __init__(self, client: Any, target: Destination, workspace: Workspace) -> None:
        self._client, self._target, self._workspace = client, target, workspace
        self._known: dict[str, _Known] = {}
        self._system = SystemSampler()

    @property
    def destination(self) -> str:
        return self._target.shown

    def begin(self, run: RunView, place: Place) -> tuple[str, bool]:
        found = self._find(place)
        is_new = found is None
        if found is None:
            tags = {
                RUN_KEY: place.key,
                "mlflow.source.name": "finetune",
                "mlflow.source.type": "LOCAL",
                "mlflow.user": _user(),
                **({"mlflow.parentRunId": place.parent} if place.parent else {}),
            }
            experiment_id = experiment_named(self._client, self._target, place.experiment)
            found = self._client.create_run(experiment_id, _ms(run.started_at), tags, run_name=run.name)
        self._known[found.info.run_id] = _Known(
            experiment_id=found.info.experiment_id,
            name=found.info.run_name,
            status=found.info.status,
            parent=place.parent,
            params=dict(found.data.params),
            tags=dict(found.data.tags),
            has_metrics=bool(found.data.metrics),
            datasets={entry.dataset.name for entry in found.inputs.dataset_inputs} if found.inputs else set(),
        )
        return str(found.info.run_id), is_new

    def facts(self, run_id: str, run: RunView, description: str) -> None:
        known = self._known[run_id]
        self._announce_headline(run_id, known, run)
        self._params(run_id, known, run)
        self._tags(run_id, known, {**run.tags, DESCRIPTION: description})
        self._datasets(run_id, known, run.splits)
        if known.name != run.name:
            self._client.update_run(run_id, name=run.name)
            known.name = run.name
        if run.status != "RUNNING":
            self._client.set_terminated(run_id, run.status, _ms(run.ended_at or time.time()))
        elif known.status != "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        known.status = run.status

    def points(self, run_id: str, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        named = [(key, point) for point in points if (key := metric_key(point.key)) is not None]
        self._metrics(run_id, [Metric(key, point.value, _ms(point.at), point.step) for key, point in named])

    def figures(self, run_id: str, run: RunView, model_id: str | None) -> None:
        from mlflow.entities import Metric

        at, now = _ms(run.ended_at or time.time()), _ms(time.time())
        known = self._known[run_id]
        logged = self._logged_figures(run_id, model_id)
        if known.parent is None:
            self._view(known.experiment_id, EXPERIMENT_VIEW, experiment_view(run.headline))
        if run.study is not None:
            view = study_view(run_id, run.headline, ARM_TAG if run.study == COMPARISON else None)
            self._view(known.experiment_id, run_id, view)
        dataset_of = {split.split: split for split in run.splits}
        metrics = []
        for key, value in {**run.figures, **dict(_readable(run.costs))}.items():
            split = dataset_of.get(key.partition("/")[0]) if "/" in key else None
            # A metric with model and dataset is also shown on the model's page, beside that dataset.
            source = {"dataset_name": split.name, "dataset_digest": _digest(split)} if split and model_id else {}
            key, value = key_text(key), _rounded(value)
            if logged.get(key) == value:
                continue
            # Exporting and registering the chosen run of a comparison changes its costs after its end. MLflow shows the newest
            # value, and allows one value for each model, key and time.
            metrics.append(Metric(key, value, now if key in logged else at, 0, model_id=model_id, **source))
        self._metrics(run_id, metrics)

    def _logged_figures(self, run_id: str, model_id: str | None) -> dict[str, float]:
        """Return the newest value of each metric of a run that MLflow has, on the model's page if there is a model."""
        if model_id is None:
            return dict(self._client.get_run(run_id).data.metrics)
        metrics = [metric for metric in self._client.get_logged_model(model_id).metrics or () if metric.run_id == run_id]
        return {metric.key: metric.value for metric in sorted(metrics, key=lambda metric: metric.timestamp)}

    def file(self, run_id: str, file: Path, name: str) -> None:
        folder = os.path.dirname(name)
        self._client.log_artifact(run_id, str(file), folder or None)

    def model(self, run_id: str, run: RunView) -> str | None:
        assert run.model is not None
        model_id = log_model(self._client, run.model, self._known[run_id].experiment_id, run_id, run.params)
        if run.model.version is not None:
            synchronise(self._client, self._target, self._workspace, [run.model.name], {run.model.version: (model_id, run_id)})
        return model_id

    def sample(self, run_id: str, run: RunView) -> None:
        from mlflow.entities import Metric

        now = time.time()
        values = self._system.sample()
        step = int(now - run.started_at)
        self._metrics(run_id, [Metric(f"system/{key}", value, _ms(now), step) for key, value in values.items()])

    def flush(self) -> None:
        """Do nothing: every call has already sent its data synchronously."""

    def _find(self, place: Place) -> Any | None:
        """Return the run of an earlier attempt, by its id or else by its key; None if there is none or it was deleted."""
        from mlflow.exceptions import MlflowException

        if place.known is not None:
            try:
                found = self._client.get_run(place.known)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                if found.info.lifecycle_stage == "active" and found.data.tags.get(RUN_KEY) == place.key:
                    return found
        experiment = self._client.get_experiment_by_name(place.experiment)
        if experiment is None:
            return None
        matches = self._client.search_runs([experiment.experiment_id], f"tags.`{RUN_KEY}` = '{place.key}'", max_results=1)
        return matches[0] if matches else None

    def _view(self, experiment_id: str, key: str, view: str) -> None:
        """Store a view of the runs table in the experiment; tolerate another run that stores it at the same time."""
        from mlflow.exceptions import MlflowException

        def is_there() -> bool:
            return bool(self._client.get_experiment(experiment_id).tags.get(f"{VIEW_TAG}{key}") == view)

        if is_there():
            return
        try:
            self._client.set_experiment_tag(experiment_id, f"{VIEW_TAG}{key}", view)
        except MlflowException:
            if not is_there():
                raise

    def _announce_headline(self, run_id: str, known: _Known, run: RunView) -> None:
        """Log the headline as NaN before all other metrics, because MLflow's pages show metrics in the order of first logging."""
        from mlflow.entities import Metric

        if run.expected_headline is not None and run.status == "RUNNING" and not run.figures and not known.has_metrics:
            self._metrics(run_id, [Metric(run.expected_headline, math.nan, _ms(run.started_at), 0)])
            known.has_metrics = True

    def _params(self, run_id: str, known: _Known, run: RunView) -> None:
        """Send the params that MLflow does not have. MLflow does not allow changes of existing ones."""
        from mlflow.entities import Param

        new = {key_text(key): value_text(value) for key, value in run.params.items()}
        new = {key: value for key, value in new.items() if key not in known.params}
        for batch in _batches([Param(key, value) for key, value in new.items()], MOST_PARAMS):
            self._client.log_batch(run_id, params=batch)
        known.params |= new

    def _tags(self, run_id: str, known: _Known, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        new = {key_text(key): value_text(value) for key, value in tags.items()}
        new = {key: value for key, value in new.items() if known.tags.get(key) != value}
        for batch in _batches([RunTag(key, value) for key, value in new.items()], MOST_TAGS):
            self._client.log_batch(run_id, tags=batch)
        known.tags |= new

    def _datasets(self, run_id: str, known: _Known, splits: Sequence[SplitView]) -> None:
        """Log each split as a dataset input: counts and digest, no pixels."""
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.exceptions import MlflowException

        inputs = []
        for split in splits:
            if split.name not in known.datasets:
                profile = {"num_rows": split.n, "classes": dict(split.counts), "manifest_sha256": split.digest}
                dataset = Dataset(
                    name=split.name,
                    digest=_digest(split),
                    source_type="local",
                    source=json.dumps({"uri": split.source}),
                    schema=json.dumps(DATASET_SCHEMA),
                    profile=json.dumps(profile),
                )
                inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", split.context)]))
        if inputs:
            try:
                self._client.log_inputs(run_id, datasets=inputs)
            except MlflowException:  # another run logged the same dataset at the same time, so a second attempt succeeds
                self._client.log_inputs(run_id, datasets=inputs)
            known.datasets |= {split.name for split in splits}

    def _metrics(self, run_id: str, metrics: Sequence[Any]) -> None:
        for batch in _batches(metrics, MOST_METRICS):
            self._client.log_batch(run_id, metrics=batch)


def experiment_named(client: Any, target: Destination, name: str) -> str:
    """Return the id of the experiment; create it if it does not exist, restore it if it was deleted."""
    from mlflow.exceptions import MlflowException

    name = re.sub(r"[^\w.\- ]", "_", name)[:200] or "images"
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, target.artifact_root, EXPERIMENT_KIND))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process created it first
    if found.lifecycle_stage == "deleted":  # a deleted experiment keeps its name, so a new one could not be created
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _readable(costs: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Yield costs in units suitable for MLflow's charts, which show two decimals."""
    for key, value in costs.items():
        if key.endswith("_bytes"):
            yield f"{key.removesuffix('_bytes')}_mib", value / 2**20
        elif key == "latency_seconds":
            yield "latency_ms", value * 1000
        else:
            yield key, value


def _rounded(value: float) -> float:
    """Return a value rounded to six significant digits, as the runs table shows it; integers stay exact."""
    return value if value.is_integer() else float(f"{value:.6g}")


def _digest(split: SplitView) -> str:
    return split.digest[:DIGEST_CHARACTERS]


def _batches(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
