"""What a worker does for MLflow: it imports nothing of it, and what its jobs and promotions came to is there all the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest
from job_standin import StandinExecutor, drive
from run_folders import begin_run, spec_of
from tiny_bundle import write_tiny_bundle

from finetune.bundle.registry import Registry
from finetune.executors.executor import Handle
from finetune.executors.local import LocalExecutor
from finetune.jobs import tracking
from finetune.jobs.database import open_database
from finetune.jobs.files import FileStore
from finetune.jobs.store import JobStore
from finetune.jobs.tracking import TrackingSync
from finetune.jobs.worker import Worker, WorkerSettings
from finetune.storage.files import modified_ns
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking.mirror import Mirror, tracked_as
from finetune.tracking.tracker import Choice


@pytest.fixture
def store(mlflow_workspace: Path) -> JobStore:
    return JobStore(open_database(mlflow_workspace / "jobs.db"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What processes would have been started for; each ends at once, well."""
    requests: list[dict[str, Any]] = []

    def start(self: TrackingSync, *, models: bool) -> None:
        requests.append({"runs": dict(self._open), "models": models})
        self._asked, self._models_asked = dict(self._open), self._registries()[0] if models else None
        self._note_ended_process(0)

    monkeypatch.setattr(TrackingSync, "_start", start)
    monkeypatch.setattr(tracking, "_LOOK_SECONDS", 0.0)
    return requests


@pytest.mark.longer
def test_runs_of_jobs_that_ended_without_a_word_are_closed_and_models_are_registered(
    mlflow_workspace: Path, store: JobStore
) -> None:
    workspace, runs = Workspace.at(mlflow_workspace), {}
    for state in ("failed", "cancelled"):
        job, _ = store.create("ada", {}, spec_digest="0" * 64)
        claim = store.claim("a worker that is gone")
        runs[state] = RunDir(workspace.runs / job.id)
        begin_run(runs[state], spec_of("full"))
        assert Mirror(runs[state], Choice("mlflow"), workspace, "flowers").update(alive=True) == ""
        assert claim is not None
        store.finish(claim, state)  # type: ignore[arg-type]
    store.create("ada", {}, spec_digest="0" * 64)
    store.request_cancel(store.list()[0][0].id)  # it never began
    write_tiny_bundle(mlflow_workspace / "bundle")
    Registry(workspace.models).register(mlflow_workspace / "bundle", "trees")
    Worker(store, LocalExecutor(), mlflow_workspace, WorkerSettings()).run(until_idle=True)
    uri = f"sqlite:///{workspace.mlflow_database}"
    client = mlflow.MlflowClient(uri, registry_uri=uri)
    ended = {state: client.get_run(tracked_as(run, "mlflow")).info for state, run in runs.items()}
    assert {state: info.status for state, info in ended.items()} == {"failed": "FAILED", "cancelled": "KILLED"}
    assert all(info.end_time for info in ended.values())
    assert {alias: str(version) for alias, version in client.get_registered_model("trees").aliases.items()} == {"champion": "1"}


def test_a_promotion_is_told_once_and_mlflow_is_asked_now_and_then(
    mlflow_workspace: Path, store: JobStore, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(Workspace.at(mlflow_workspace).models)
    sync = TrackingSync(store, mlflow_workspace)
    for seed in range(2):
        write_tiny_bundle(mlflow_workspace / f"bundle-{seed}", seed=seed)
        registry.register(mlflow_workspace / f"bundle-{seed}", "trees")
    for _ in range(3):
        sync.step()
    assert asked == [{"runs": {}, "models": True}]
    registry.set_alias("trees", "champion", "2")
    for _ in range(3):
        sync.step()
    assert len(asked) == 2
    monkeypatch.setattr(tracking, "PULL_SECONDS", 0.0)
    sync.step()
    assert len(asked) == 2  # nothing has changed in MLflow's database
    os.utime(mlflow_workspace / "mlflow.db", (1, 1))
    sync.step()
    assert len(asked) == 3
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")  # a server cannot be looked at from outside
    sync.step()
    assert len(asked) == 4


def test_a_model_that_is_deleted_while_a_worker_looks_is_no_trouble(
    mlflow_workspace: Path, store: JobStore, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_bundle(mlflow_workspace / "bundle")
    models = Workspace.at(mlflow_workspace).models
    for name in ("oaks", "trees"):
        Registry(models).register(mlflow_workspace / "bundle", name)

    def meanwhile(path: Path) -> int | None:
        shutil.rmtree(models / "oaks", ignore_errors=True)
        return modified_ns(path)

    monkeypatch.setattr(tracking, "modified_ns", meanwhile)
    TrackingSync(store, mlflow_workspace).step()
    assert asked == [{"runs": {}, "models": True}]


def test_where_nothing_was_ever_tracked_nothing_is_started(
    tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_tiny_bundle(tmp_path / "bundle")
    Registry(Workspace.at(tmp_path).models).register(tmp_path / "bundle", "trees")
    TrackingSync(JobStore(open_database(tmp_path / "jobs.db")), tmp_path).step()
    assert asked == []


def test_what_fails_is_tried_again_later_each_time_after_a_longer_pause(mlflow_workspace: Path, store: JobStore) -> None:
    sync = TrackingSync(store, mlflow_workspace)
    pauses = []
    for _ in range(8):
        pauses.append(sync._pause_seconds)
        sync._note_ended_process(1)
    assert pauses[:3] == [60.0, 120.0, 240.0]
    assert pauses[-1] == 3600.0
    sync._note_ended_process(0)
    assert sync._pause_seconds == 60.0


class RecordingExecutor(StandinExecutor):
    """Notes the commands that it is asked to run."""

    def __init__(self) -> None:
        super().__init__()
        self.commands: list[list[str]] = []

    def start(self, job_id: str, command: Sequence[str], **given: Any) -> Handle:
        self.commands.append(list(command))
        kept = [word for word in command if word not in ("--experiment", "roses of May")]
        return super().start(job_id, kept, **given)


@pytest.mark.parametrize("uploaded", [True, False])
def test_the_runs_on_an_upload_are_gathered_under_the_name_of_its_archive(tmp_path: Path, uploaded: bool) -> None:
    engine = open_database(tmp_path / "jobs.db")
    files, store, executor = FileStore(engine), JobStore(engine), RecordingExecutor()
    upload, _ = files.create(
        "ada",
        filename="roses of May.tar.gz",
        purpose="fine-tune",
        size_bytes=1,
        sha256="0" * 64,
        summary={},
        place=lambda _: None,
    )
    training_file = str(tmp_path / "files" / upload.id) if uploaded else "/data/tulips"
    spec = {"training_file": training_file, "metadata": {"steps": "1"}}
    job, _ = store.create("ada", spec, spec_digest="0" * 64)
    worker = Worker(store, executor, tmp_path, WorkerSettings(threads=1, heartbeat_seconds=0.1, min_free_bytes=0))
    drive(worker, until=lambda: store.get(job.id).state == "succeeded")
    (command,) = executor.commands
    assert command[-2:] == (["--experiment", "roses of May"] if uploaded else [command[-2], "--json"])


@pytest.mark.parametrize(
    ("filename", "name"),
    [("flowers.zip", "flowers"), ("flowers.tar.gz", "flowers"), ("a.b.tgz", "a.b"), ("flowers", "flowers"), ("dir/x.zip", "x")],
)
def test_an_archive_is_called_without_its_ending(tmp_path: Path, filename: str, name: str) -> None:
    files = FileStore(open_database(tmp_path / "jobs.db"))
    upload, _ = files.create(
        "ada", filename=filename, purpose="fine-tune", size_bytes=1, sha256="0" * 64, summary={}, place=lambda _: None
    )
    assert files.dataset_name(str(tmp_path / upload.id)) == name
    assert files.dataset_name("/data/flowers") is None
    assert files.dataset_name(f"/data/file-{'0' * 26}") is None
