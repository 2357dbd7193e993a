"""MLflow as a mirror of the run folder: what is in the folder gets there, now or later, and never at the cost of the run.

The caller says once what MLflow should know beyond files (experiment, params, dataset, model name); that is kept in
``mlflow.json`` in the run folder. A background thread compares it, the journal ``metrics.jsonl`` and the result files with what
MLflow has, and sends the difference. One path therefore serves a live run, a run resumed after a kill, and `replay` of a run that
MLflow missed. The training loop only writes its journal and never waits.

Does not know what trains or serves. mlflow is imported inside `_Link` alone, in that thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import importlib.util
import json
import logging
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol
from urllib.parse import quote

from finetune.errors import DiskFull, InvalidInput, MissingExtra
from finetune.rundir import RunDir, read_json, sha256_file, write_json

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

ARTIFACTS = ("spec.yaml", "resolved.json", "split.csv", "evaluation.json", "report.html", "figures")
"""What is sent of a run folder, each when it appears and again when it changes. The bundle goes when it is registered."""

_FLUSH_SECONDS = 2.0
_END_SECONDS = {"RUNNING": 30.0, "FINISHED": 30.0, "FAILED": 15.0, "KILLED": 5.0}  # who is being killed has little time
_RETRY_SECONDS = 60.0  # the longest pause between two attempts while MLflow does not answer
_SYSTEM_SECONDS = 10.0
_JOURNAL_BYTES = 4_000_000  # read at a time
_MAX_METRICS, _MAX_PARAMS, _MAX_VALUE_CHARACTERS, _MAX_KEY_CHARACTERS, _MAX_DIGEST_CHARACTERS = 1000, 100, 6000, 250, 36

# A request to a server that does not answer ends in about 20 s instead of minutes. MLflow reads these at each call.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}


@dataclass(frozen=True)
class Delivery:
    """Whether MLflow has everything of a run; `reason` says why not."""

    complete: bool
    reason: str = ""


class Tracker(Protocol):
    """What the pipeline tells about a run. No method waits for a server except `wait_for_run_id` and `end`, which are bounded."""

    def params(self, values: Mapping[str, object]) -> None: ...
    def tags(self, values: Mapping[str, str]) -> None: ...
    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, object]) -> None: ...
    def bundle(self, name: str, *, aliases: Sequence[str] = (), tags: Mapping[str, str] | None = None) -> None: ...
    def flush_metrics(self) -> None: ...
    def wait_for_run_id(self, timeout_seconds: float) -> str | None: ...
    def end(self, status: Status, timeout_seconds: float | None = None) -> Delivery: ...


class NoTracker:
    """Tells nobody."""

    def params(self, values: Mapping[str, object]) -> None: ...
    def tags(self, values: Mapping[str, str]) -> None: ...
    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, object]) -> None: ...
    def bundle(self, name: str, *, aliases: Sequence[str] = (), tags: Mapping[str, str] | None = None) -> None: ...
    def flush_metrics(self) -> None: ...

    def wait_for_run_id(self, timeout_seconds: float) -> str | None:
        return None

    def end(self, status: Status, timeout_seconds: float | None = None) -> Delivery:
        return Delivery(complete=True)


@dataclass(frozen=True)
class Destination:
    """Where MLflow keeps runs. `artifact_root` is None when a tracking server decides that itself."""

    uri: str
    artifact_root: str | None

    @property
    def shown(self) -> str:
        """The URI without a password."""
        return _without_credentials(self.uri)


def destination(workspace: Path) -> Destination:
    """``MLFLOW_TRACKING_URI``, else a SQLite file in the workspace. Always explicit: MLflow's own choice depends on the cwd."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace.absolute() / 'mlflow.db'}"
    if uri.startswith("file:") or ("://" not in uri and uri != "databricks"):
        raise InvalidInput(
            f"MLFLOW_TRACKING_URI={uri}: MLflow's file store is not supported (MLflow itself has retired it). "
            "Give sqlite:////absolute/path/mlflow.db, postgresql://… or http(s)://…, or leave it unset"
        )
    serves_artifacts = uri.startswith(("http://", "https://", "databricks"))
    return Destination(uri, None if serves_artifacts else (workspace.absolute() / "mlartifacts").as_uri())


@dataclass(frozen=True)
class RunRecord:
    """What MLflow should hold about a run besides files and metrics, and how far that got; ``mlflow.json`` in the run folder."""

    experiment: str
    name: str
    started_at: float
    key: str  # finds the run in MLflow if this process dies between creating it there and noting its id here
    run_id: str | None = None
    tracking_uri: str = ""  # for people; without credentials
    parent_run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[Mapping[str, str]] = ()
    model: Mapping[str, Any] | None = None  # name, aliases, tags
    model_version: str | None = None
    status: str = "RUNNING"
    ended_at: float | None = None
    attempts: int = 0
    sent: Mapping[str, str] = field(default_factory=dict)  # path in the run folder -> sha256 of what was sent
    complete: bool = False


def record_path(run: RunDir) -> Path:
    return run.root / "mlflow.json"


def read_record(run: RunDir) -> RunRecord | None:
    """The record of a run, None if it was never tracked."""
    path = record_path(run)
    if not path.exists():
        return None
    known = {field.name for field in fields(RunRecord)}  # another version of finetune may have written more
    return RunRecord(**{key: value for key, value in read_json(path).items() if key in known})


def open_run(
    run: RunDir,
    *,
    workspace: Path,
    experiment: str,
    name: str,
    parent_run_id: str | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, object] | None = None,
) -> MlflowTracker:
    """Start mirroring `run`; returns at once, the connection is made in the background.

    A folder that was tracked before goes on with the MLflow run it had, also after a kill left that run RUNNING. Call it early:
    the first use of a new database takes seconds, which pass while the data is prepared.
    """
    record = read_record(run) or RunRecord(experiment, name, time.time(), uuid.uuid4().hex)
    record = replace(
        record,
        run_id=run_id or record.run_id,
        parent_run_id=parent_run_id or record.parent_run_id,
        attempts=record.attempts + 1,
        status="RUNNING",
        ended_at=None,
        complete=False,
    )
    tracker = MlflowTracker(run, _State(run, record), workspace)
    tracker.tags({"finetune.attempts": str(record.attempts), **(tags or {})})
    tracker.params(params or {})
    tracker.start()
    return tracker


def replay(run: RunDir, workspace: Path, status: Status | None = None) -> Delivery:
    """Send what MLflow lacks of a run that is over; safe to repeat. `status` closes a run whose process died before it could."""
    record = read_record(run)
    if record is None:
        return Delivery(complete=False, reason=f"{run.root} was never tracked: it holds no mlflow.json")
    if status:
        record = replace(record, status=status, ended_at=record.ended_at or time.time())
    tracker = MlflowTracker(run, _State(run, record), workspace)
    reason = tracker.deliver(last=True)
    return Delivery(complete=not reason, reason=reason)


_Point = tuple[str, int, float | None]  # key, step, value


class _State:
    """The record, shared by the caller's thread and the sending one, and kept on disk."""

    def __init__(self, run: RunDir, record: RunRecord) -> None:
        self._path, self._lock, self._record = record_path(run), threading.Lock(), record

    @property
    def record(self) -> RunRecord:
        return self._record

    def change(self, **changes: Any) -> RunRecord:
        with self._lock:
            self._record = replace(self._record, **changes)
            # A full disk is the run's own trouble, which it meets at its next checkpoint; it is not raised from here.
            with contextlib.suppress(OSError, DiskFull):
                write_json(self._path, asdict(self._record))
            return self._record


class MlflowTracker:
    """Keeps one MLflow run equal to one run folder, from a thread of its own."""

    def __init__(self, run: RunDir, state: _State, workspace: Path) -> None:
        self._run, self._state, self._workspace = run, state, workspace
        self._link: _Link | None = None
        self._wake, self._tried, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._reason = ""  # why the last attempt failed
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    @property
    def record(self) -> RunRecord:
        return self._state.record

    def start(self) -> None:
        self._thread.start()

    def params(self, values: Mapping[str, object]) -> None:
        """Add to the params; a key that was given before keeps its first value, as MLflow demands."""
        given = {_key(key): _text(value, _MAX_VALUE_CHARACTERS) for key, value in values.items()}
        self._want(params={**given, **self.record.params})

    def tags(self, values: Mapping[str, str]) -> None:
        self._want(tags={**self.record.tags, **{_key(key): _text(value, _MAX_VALUE_CHARACTERS) for key, value in values.items()}})

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, object]) -> None:
        """Name the data by its manifest digest; `profile` holds counts. No pixel is sent."""
        entry = {
            "name": name,
            "digest": digest[:_MAX_DIGEST_CHARACTERS],
            "source": json.dumps({"uri": source}),
            "profile": json.dumps({"digest": digest, **profile}),
        }
        self._want(datasets=[*(known for known in self.record.datasets if known["name"] != name), entry])

    def bundle(self, name: str, *, aliases: Sequence[str] = (), tags: Mapping[str, str] | None = None) -> None:
        """Register the run's ``bundle/`` as a version of the model `name`; ``models:/name@alias`` then downloads all of it."""
        # MLflow keeps these names for itself, and resolves models:/name/latest without any alias.
        allowed = [alias for alias in aliases if alias != "latest" and not re.fullmatch(r"[vV]\d+", alias)]
        self._want(model={"name": name, "aliases": allowed, "tags": dict(tags or {})})

    def flush_metrics(self) -> None:
        """Ask for the journal to be sent now instead of within two seconds."""
        self._wake.set()

    def wait_for_run_id(self, timeout_seconds: float) -> str | None:
        """The id that MLflow gave to this run, which its children need; None if MLflow does not answer."""
        self._tried.wait(timeout_seconds)
        return self.record.run_id

    def end(self, status: Status, timeout_seconds: float | None = None) -> Delivery:
        """Close the MLflow run after everything is sent. What was not sent in time stays in the run folder for `replay`."""
        timeout_seconds = _END_SECONDS[status] if timeout_seconds is None else timeout_seconds
        self._state.change(status=status, ended_at=time.time())
        self._ending.set()
        self._wake.set()
        self._thread.join(timeout_seconds)
        if self.record.complete:
            return Delivery(complete=True)
        reason = self._reason or f"no answer within {timeout_seconds:g} s"
        self._note(
            "mlflow_incomplete", f"MLflow has not everything of this run ({reason}); it is all in this folder, to be sent later"
        )
        return Delivery(complete=False, reason=reason)

    def deliver(self, *, last: bool = False) -> str:
        """Send what is missing, each part for itself; the reason for the first failure, or the empty string."""
        reason = _attempt(self._connect)
        self._tried.set()
        if self._link is None:
            return reason
        for part in self._link.parts(last=last):
            failure = _attempt(part)
            reason = reason or failure
        if last and not reason:
            self._state.change(complete=True)
        return reason

    def _connect(self) -> None:
        self._link = self._link or _Link(destination(self._workspace), self._run, self._state)

    def _want(self, **changes: Any) -> None:
        self._state.change(complete=False, **changes)
        self._wake.set()

    def _work(self) -> None:
        failures = 0
        while True:
            self._wake.clear()
            ending = self._ending.is_set()
            reason = self.deliver(last=ending)
            self._report(reason)
            if ending:
                return
            failures = failures + 1 if reason else 0
            if reason:
                self._ending.wait(min(_RETRY_SECONDS, _FLUSH_SECONDS * 2**failures))
            else:
                self._wake.wait(_FLUSH_SECONDS)

    def _report(self, reason: str) -> None:
        """One event when MLflow stops answering, one when it is back; not one for each attempt."""
        if reason and not self._reason:
            logging.getLogger(__name__).warning("MLflow: %s", reason)
            self._note(
                "mlflow_unavailable", f"MLflow cannot be written ({reason}). The run goes on; what was not sent is sent later"
            )
        if self._reason and not reason:
            self._note("mlflow_recovered", "MLflow answers again; it has what it missed")
        self._reason = reason

    def _note(self, kind: str, message: str) -> None:
        with contextlib.suppress(OSError):  # the disk is full: the run itself will say so
            self._run.event(kind, message)


def _attempt(part: Callable[[], None]) -> str:
    """Run `part`; why it failed, or the empty string.

    The one broad catch of the project. Whatever MLflow, its database driver, its HTTP stack or its import raises, the run must go
    on: everything that would have been sent is in the run folder and is sent later. The reason goes to the run's events.
    """
    try:
        part()
    except Exception as error:  # noqa: BLE001
        return _without_credentials(f"{type(error).__name__}: {str(error).strip()[:300]}")
    return ""


class _Link:
    """A connection to MLflow and to one run in it. Everything here may raise anything, and may be slow."""

    def __init__(self, target: Destination, run: RunDir, state: _State) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # MLflow and Alembic would write their progress over the progress bar; what matters is reported in the run's events.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        if target.uri.startswith("sqlite:///"):
            _create_database(Path(target.uri.removeprefix("sqlite:///")), mlflow.MlflowClient)
        self._run, self._state = run, state
        self._client = mlflow.MlflowClient(tracking_uri=target.uri)
        self._journal = _Journal(run.metrics)
        self._system = _SystemSampler()
        self._seen: dict[Path, tuple[int, int]] = {}  # mtime and size of files whose digest was compared already
        found = self._find_run() or self._create_run(target)
        self._params, self._tags = dict(found.data.params), dict(found.data.tags)
        self._sent_datasets = {(i.dataset.name, i.dataset.digest) for i in found.inputs.dataset_inputs}
        self._artifact_uri, self._status = found.info.artifact_uri, found.info.status
        self._already_there = self._points_there(list(found.data.metrics))
        state.change(run_id=found.info.run_id, tracking_uri=target.shown)

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
            points = [point for record in records for point in _points(record)]
            metrics = [
                Metric(key, value, at_ms, step)
                for key, value, at_ms, step in points
                if _identity(key, step, value) not in self._already_there
            ]
            for start in range(0, len(metrics), _MAX_METRICS):
                self._client.log_batch(self._run_id, metrics=metrics[start : start + _MAX_METRICS])
            self._journal.accept()

    def _points_there(self, keys: Sequence[str]) -> set[_Point]:
        """What earlier attempts sent."""
        wanted = [key for key in keys if not key.startswith("system/")]
        histories = {key: self._client.get_metric_history(self._state.record.run_id, key) for key in wanted}
        return {_identity(key, point.step, point.value) for key, history in histories.items() for point in history}

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
        if model and self._state.record.model_version is None and self._run.bundle.is_dir():
            self._push_files([self._run.bundle])
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


class _Journal:
    """Reads the lines that were appended to ``metrics.jsonl`` since they were last accepted."""

    def __init__(self, path: Path) -> None:
        self._path, self._accepted, self._read = path, 0, 0

    def unread(self) -> Iterator[list[dict[str, Any]]]:
        """Batches of whole lines; a line that is being written, or that a kill tore, is left out."""
        if not self._path.exists():
            return
        if self._path.stat().st_size < self._accepted:  # a resume cut it back to its checkpoint
            self._accepted = 0
        self._read = self._accepted
        with open(self._path, "rb") as stream:
            while True:
                stream.seek(self._read)
                chunk = stream.read(_JOURNAL_BYTES)
                whole = chunk[: chunk.rfind(b"\n") + 1]
                if not whole:
                    return
                self._read += len(whole)
                yield [record for line in whole.splitlines() if (record := _parse(line))]

    def accept(self) -> None:
        self._accepted = self._read


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


@dataclass(frozen=True)
class UiCommand:
    """The command that shows the workspace's MLflow pages, with the environment it needs on top of the present one."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    url: str


def open_ui(workspace: Path, host: str = "127.0.0.1", port: int = 5000) -> NoReturn:
    """Become MLflow's server: this process is replaced, so that Ctrl-C and signals go straight to it.

    Raises:
        MissingExtra: MLflow is not installed.
        InvalidInput: as `ui_command`.
    """
    command = ui_command(workspace, host, port)
    if importlib.util.find_spec("mlflow") is None:
        raise MissingExtra("MLflow is not installed here. Install it with the training extra: pip install 'finetune[train]'")
    os.execve(command.arguments[0], command.arguments, {**os.environ, **command.environment})


def ui_command(workspace: Path, host: str, port: int) -> UiCommand:
    """How to start MLflow's pages on the embedded database: one worker, no job executor, this machine only.

    Raises:
        InvalidInput: `host` is not a loopback address (these pages ask for no password), or MLflow already runs elsewhere.
    """
    target = destination(workspace)
    if target.artifact_root is None:
        raise InvalidInput(f"MLFLOW_TRACKING_URI={target.shown} is a server already: open that address in a browser")
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise InvalidInput(
            f"--host {host}: MLflow's pages ask for no password, so they are shown on this machine only (127.0.0.1). "
            "From elsewhere use an SSH tunnel, or run an MLflow server with authentication and set MLFLOW_TRACKING_URI"
        )
    names = ("localhost", "127.0.0.1", "[::1]")
    hosts = ",".join(allowed for name in names for allowed in (name, f"{name}:{port}"))
    options = {
        "--backend-store-uri": target.uri,
        "--default-artifact-root": target.artifact_root,
        "--host": host,
        "--port": str(port),
        "--workers": "1",
        "--allowed-hosts": hosts,
    }
    return UiCommand(
        arguments=(sys.executable, "-m", "mlflow", "server", *(word for option in options.items() for word in option)),
        environment={**_ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        url=f"http://{f'[{host}]' if ':' in host else host}:{port}",
    )


def run_url(ui: str, experiment_id: str, run_id: str) -> str:
    """The page of one run under the MLflow pages at `ui`, in their mode for training rather than for language models."""
    return f"{ui.rstrip('/')}/#/experiments/{quote(experiment_id)}/runs/{quote(run_id)}?workflowType=machine_learning"


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


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _points(record: Mapping[str, Any]) -> Iterator[tuple[str, float, int, int]]:
    """(key, value, time in ms, step) of each value of a journal line; the epoch is a metric too, so that charts can use it."""
    at_ms, step = int(record["at"] * 1000), int(record["step"])
    values = dict(record["values"])
    if record.get("epoch") is not None:
        values["epoch"] = record["epoch"]
    for key, value in values.items():
        if isinstance(value, int | float):
            yield _key(key), float(value), at_ms, step


def _identity(key: str, step: int, value: float) -> _Point:
    """What makes two points the same one.

    A resumed run computes some steps again, at another time of day. A step of training is the same step then, whatever a
    clock-dependent figure such as images per second says; an evaluation is the same only if its value is.
    """
    return (key, step, None if key.startswith(("train/", "stage/")) else value)


def _key(name: str) -> str:
    """A name that MLflow takes: its characters, no empty or dotted path part, at most 250 long."""
    parts = (part for part in re.sub(r"[^\w.\-: /]", "_", name).split("/") if part.strip(". "))
    return "/".join(parts)[:_MAX_KEY_CHARACTERS] or "_"


def _text(value: object, limit: int) -> str:
    """A value as a param holds it; what is too long is cut, the same way each time, and says so."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) <= limit:
        return text
    note = f"… ({len(text)} characters)"
    return text[: limit - len(note)] + note


def _without_credentials(text: str) -> str:
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
