"""The connection to MLflow and to one run in it. Everything here may raise anything and may be slow; `tracker` sees to that."""

from __future__ import annotations

import fcntl
import getpass
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.storage.files import sha256_file
from finetune.storage.rundir import RunDir
from finetune.tracking.journal import Identity, Journal, identity, points_of
from finetune.tracking.record import State
from finetune.tracking.server import ENVIRONMENT, Destination

ARTIFACTS = ("spec.yaml", "resolved.json", "split.csv", "evaluation.json", "folds.json", "report.html", "figures")
"""What is sent of a run folder, each when it appears and again when it changes. The bundle goes when it is registered."""

_SYSTEM_SECONDS = 10.0
_MAX_METRICS, _MAX_PARAMS = 1000, 100  # in one call


class Link:
    """One run in MLflow, found or created, and what it lacks."""

    def __init__(self, target: Destination, run: RunDir, state: State) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # MLflow and Alembic would write their progress over the progress bar; what matters is reported in the run's events.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        if target.database:
            _create_database(target.database, mlflow.MlflowClient)
        self._run, self._state = run, state
        self._client = mlflow.MlflowClient(tracking_uri=target.uri)
        self._journal = Journal(run.metrics)
        self._system = _SystemSampler()
        self._seen: dict[Path, tuple[int, int]] = {}  # mtime and size of files whose digest was compared already
        found = self._find_run() or self._create_run(target)
        state.change(run_id=found.info.run_id, tracking_uri=target.shown)
        self._params, self._tags = dict(found.data.params), dict(found.data.tags)
        self._sent_datasets = {(i.dataset.name, i.dataset.digest) for i in found.inputs.dataset_inputs}
        self._artifact_uri, self._status = found.info.artifact_uri, found.info.status
        self._already_there = self._points_there(list(found.data.metrics))

    @property
    def _run_id(self) -> str:
        return str(self._state.record.run_id)

    def parts(self, *, last: bool) -> list[Callable[[], None]]:
        """What to send, in order. A part that fails does not keep the others back, nor the run from being closed."""
        parts = [self._reopen, self._push_params, self._push_tags, self._push_dataset, self._push_metrics, self._push_results]
        return [*parts, self._push_bundle, self._close] if last else [*parts, self._push_system_metrics, self._push_bundle]

    def _reopen(self) -> None:
        if self._status != "RUNNING" and self._state.record.status == "RUNNING":
            self._client.update_run(self._run_id, status="RUNNING")
            self._status = "RUNNING"

    def _close(self) -> None:
        record = self._state.record
        if record.status != "RUNNING":
            self._client.set_terminated(self._run_id, record.status, int((record.ended_at or time.time()) * 1000))

    # -- the run

    def _find_run(self) -> Any | None:
        """The run of an earlier attempt: by its id, else by its key; None if MLflow has none that is not deleted."""
        from mlflow.exceptions import MlflowException

        record = self._state.record
        if record.run_id:
            try:
                found = self._client.get_run(record.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                if found.info.lifecycle_stage == "active":
                    return found
        experiment = self._client.get_experiment_by_name(record.experiment)
        if experiment is None:
            return None
        matches = self._client.search_runs([experiment.experiment_id], f"tags.`finetune.run_key` = '{record.key}'", max_results=1)
        return matches[0] if matches else None

    def _create_run(self, target: Destination) -> Any:
        record = self._state.change(sent={}, model_version=None)
        tags = {
            **record.tags,
            "finetune.run_key": record.key,
            "mlflow.source.name": "finetune",
            "mlflow.source.type": "LOCAL",
            "mlflow.user": _user(),
        }
        if record.parent_run_id:
            tags["mlflow.parentRunId"] = record.parent_run_id
        return self._client.create_run(
            self._experiment_id(target, record.experiment), int(record.started_at * 1000), tags, run_name=record.name
        )

    def _experiment_id(self, target: Destination, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found:
            if found.lifecycle_stage == "deleted":  # its name stays taken, so that no other could be created
                self._client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        try:
            # The kind makes MLflow's page open on runs and charts instead of on traces.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            return str(self._client.create_experiment(name, target.artifact_root, tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return str(self._client.get_experiment_by_name(name).experiment_id)  # another run was faster

    # -- what it holds

    def _push_params(self) -> None:
        from mlflow.entities import Param

        new = {key: value for key, value in self._state.record.params.items() if key not in self._params}
        params = [Param(key, value) for key, value in new.items()]
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + _MAX_PARAMS])
        self._params |= new

    def _push_tags(self) -> None:
        from mlflow.entities import RunTag

        new = {key: value for key, value in self._state.record.tags.items() if self._tags.get(key) != value}
        tags = [RunTag(key, value) for key, value in new.items()]
        for start in range(0, len(tags), _MAX_PARAMS):
            self._client.log_batch(self._run_id, tags=tags[start : start + _MAX_PARAMS])
        self._tags |= new

    def _push_dataset(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        new = [data for data in self._state.record.datasets if (data["name"], data["digest"]) not in self._sent_datasets]
        if not new:
            return
        context = [InputTag("mlflow.data.context", "training")]
        self._client.log_inputs(
            self._run_id, datasets=[DatasetInput(Dataset(source_type="local", schema=None, **data), context) for data in new]
        )
        self._sent_datasets |= {(data["name"], data["digest"]) for data in new}

    def _push_metrics(self) -> None:
        from mlflow.entities import Metric

        for records in self._journal.unread():
            points = [point for record in records for point in points_of(record)]
            metrics = [
                Metric(key, value, at_ms, step)
                for key, value, at_ms, step in points
                if identity(key, step, value) not in self._already_there
            ]
            for start in range(0, len(metrics), _MAX_METRICS):
                self._client.log_batch(self._run_id, metrics=metrics[start : start + _MAX_METRICS])
            self._journal.accept()

    def _points_there(self, keys: Sequence[str]) -> set[Identity]:
        """What earlier attempts sent."""
        wanted = [key for key in keys if not key.startswith("system/")]
        histories = {key: self._client.get_metric_history(self._run_id, key) for key in wanted}
        return {identity(key, point.step, point.value) for key, history in histories.items() for point in history}

    def _push_system_metrics(self) -> None:
        from mlflow.entities import Metric

        values = self._system.sample()
        if values:
            now = time.time()
            step = int(now - self._state.record.started_at)
            metrics = [Metric(f"system/{key}", value, int(now * 1000), step) for key, value in values.items()]
            self._client.log_batch(self._run_id, metrics=metrics)

    def _push_results(self) -> None:
        self._push_files([self._run.root / name for name in ARTIFACTS])

    def _push_bundle(self) -> None:
        model = self._state.record.model
        if model and self._run.bundle.is_dir():
            self._push_files([self._run.bundle])
            if self._state.record.model_version is None:
                self._register(model)

    def _push_files(self, paths: Sequence[Path]) -> None:
        files = [
            file
            for path in paths
            for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
            if file.is_file() and not file.name.startswith(".")
        ]
        for file in files:
            stat = file.stat()
            if self._seen.get(file) == (stat.st_mtime_ns, stat.st_size):
                continue
            name, digest = file.relative_to(self._run.root).as_posix(), sha256_file(file)
            if self._state.record.sent.get(name) != digest:
                folder = Path(name).parent.as_posix()
                self._client.log_artifact(self._run_id, str(file), None if folder == "." else folder)
                self._state.change(sent={**self._state.record.sent, name: digest})
            self._seen[file] = (stat.st_mtime_ns, stat.st_size)

    def _register(self, model: Mapping[str, Any]) -> None:
        from mlflow.exceptions import MlflowException

        name = str(model["name"])
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        registered = [v for v in self._client.search_model_versions(f"run_id = '{self._run_id}'") if v.name == name]
        version = registered[0] if registered else self._client.create_model_version(
            name, f"{self._artifact_uri}/bundle", self._run_id, model["tags"], await_creation_for=0
        )  # fmt: skip
        for alias in model["aliases"]:
            self._client.set_registered_model_alias(name, alias, version.version)
        self._state.change(model_version=str(version.version))


class _SystemSampler:
    """Processor, memory and, where there is one, NVIDIA GPU use, at most every ten seconds; under MLflow's own names."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

        self._monitors, self._due = [CPUMonitor(), *_gpu_monitors()], 0.0

    def sample(self) -> dict[str, float]:
        if time.monotonic() < self._due:
            return {}
        self._due = time.monotonic() + _SYSTEM_SECONDS
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values.update(monitor.aggregate_metrics())
            monitor.clear_metrics()
        return values


def _gpu_monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    try:
        return [GPUMonitor()]
    except (ImportError, RuntimeError):  # no driver library, or no card
        return []


def _create_database(path: Path, client: Any) -> None:
    """Make MLflow's tables under a temporary name, then rename: a kill amid its migrations would spoil the file for good."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two first runs at once: one builds, the other finds it built
        if path.exists():
            return
        unfinished = path.with_name(f".{path.name}.new")
        unfinished.unlink(missing_ok=True)
        client(tracking_uri=f"sqlite:///{unfinished}").search_experiments(max_results=1)
        os.replace(unfinished, path)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
