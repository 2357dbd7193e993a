"""MLflow ends up with what the run folder holds, whatever happens in between, and whatever MLflow does the run goes on."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from tiny_bundle import probe_files, write_tiny_bundle

from finetune.bundle.predictor import Predictor
from finetune.errors import InvalidInput
from finetune.executors.local import LocalExecutor
from finetune.jobs.database import open_database
from finetune.jobs.store import JobStore
from finetune.jobs.worker import Worker, WorkerSettings
from finetune.storage.files import read_json, write_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.tracking import MlflowTracker, NoTracker, destination, open_run, read_record, replay, run_url, ui_command

SECONDS = 60  # a bound for a hang, never a wait


@pytest.fixture
def client(mlflow_workspace: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(destination(mlflow_workspace).uri)


def run_folder(workspace: Path, name: str = "a") -> RunDir:
    run = RunDir(workspace / "runs" / name).create()
    run.spec.write_text("training_file: ./flowers\n")
    run.figures.mkdir(exist_ok=True)
    (run.figures / "curves.png").write_bytes(b"not really a picture")
    run.bundle.mkdir(exist_ok=True)
    (run.bundle / "model.onnx").write_bytes(b"not really a model")
    (run.bundle / "bundle.json").write_text("{}")
    return run


def start(run: RunDir, workspace: Path, **more) -> MlflowTracker:
    return open_run(run, workspace=workspace, experiment="flowers", name="probe", **more)


def history(client: mlflow.MlflowClient, run: RunDir, key: str) -> list[tuple[int, float]]:
    record = read_record(run)
    assert record is not None
    return [(point.step, point.value) for point in client.get_metric_history(record.run_id, key)]


def kinds(run: RunDir) -> list[str]:
    return [event["kind"] for event in read_lines(run.events)]


def test_a_run_that_is_to_wait_is_told_to_mlflow_when_it_connects_or_ends(mlflow_workspace: Path, client) -> None:
    for number, begin in enumerate((lambda tracker: tracker.connect(), lambda tracker: tracker.end("FAILED", SECONDS))):
        tracker = start(run_folder(mlflow_workspace, f"waiting-{number}"), mlflow_workspace, connect=False)
        tracker.params({"method.type": "full"})
        assert tracker.record.run_id is None
        begin(tracker)
        run_id = tracker.wait_for_run_id(SECONDS)
        tracker.end("FAILED", SECONDS)
        assert run_id is not None
        assert client.get_run(run_id).data.params == {"method.type": "full"}


def test_everything_that_the_run_folder_holds_is_in_mlflow_at_the_end(mlflow_workspace: Path, client) -> None:
    run = run_folder(mlflow_workspace)
    tracker = start(run, mlflow_workspace, params={"method.type": "linear_probe", "stages": ["stem", "head"]}, tags={"job": "7"})
    for step in range(3):
        run.metric(step, {"train/loss": 1 / (step + 1), "stage/blocks.0/grad_norm": 0.5})
    run.metric(3, {"val/top1": 0.75}, epoch=1.0)
    tracker.dataset("flowers", "d" * 64, "./flowers", {"n_train": 12})
    tracker.bundle("flower-model", aliases=["candidate"], tags={"method": "linear_probe"})
    assert tracker.end("FINISHED", SECONDS).complete
    stored = client.get_run(tracker.record.run_id)
    assert (stored.info.status, stored.info.run_name) == ("FINISHED", "probe")
    assert stored.data.params == {"method.type": "linear_probe", "stages": '["stem", "head"]'}
    assert (stored.data.tags["job"], stored.data.tags["finetune.attempts"]) == ("7", "1")
    assert history(client, run, "train/loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert stored.data.metrics["val/top1"] == 0.75
    assert stored.data.metrics["epoch"] == 1.0
    assert any(key.startswith("system/") for key in stored.data.metrics)
    written = [int(line["at"] * 1000) for line in read_lines(run.metrics)][:3]
    assert [p.timestamp for p in client.get_metric_history(stored.info.run_id, "train/loss")] == written
    (data,) = stored.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest, json.loads(data.dataset.profile)["n_train"]) == ("flowers", "d" * 36, 12)
    assert {entry.path for entry in client.list_artifacts(stored.info.run_id)} == {"spec.yaml", "figures", "bundle"}
    assert client.get_experiment(stored.info.experiment_id).tags["mlflow.experimentKind"] == "custom_model_development"
    assert run.events.exists() is False


def test_the_registered_model_downloads_as_a_bundle_that_predicts(mlflow_workspace: Path, client, monkeypatch) -> None:
    run = RunDir(mlflow_workspace / "runs" / "a").create()
    write_tiny_bundle(run.bundle)
    tracker = start(run, mlflow_workspace)
    tracker.bundle("flower-model", aliases=["champion", "latest", "v1"])  # the last two are MLflow's own
    assert tracker.end("FINISHED", SECONDS).complete
    assert tracker.record.model_version == "1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", destination(mlflow_workspace).uri)
    (mlflow_workspace / "files").mkdir()
    folder = mlflow.artifacts.download_artifacts("models:/flower-model@champion", dst_path=str(mlflow_workspace / "files"))
    image = probe_files()[0]
    assert Predictor.load(Path(folder)).predict(image).labels == Predictor.load(run.bundle).predict(image).labels
    assert mlflow.artifacts.download_artifacts("models:/flower-model/latest")


def test_a_part_that_fails_keeps_neither_the_others_back_nor_the_run_open(mlflow_workspace: Path, client, monkeypatch) -> None:
    run = run_folder(mlflow_workspace)
    run.metric(1, {"train/loss": 2.0})
    tracker = start(run, mlflow_workspace)
    tracker.bundle("a name: with what MLflow refuses / 🦆", aliases=["not allowed!"])
    ended = tracker.end("FAILED", SECONDS)
    assert not ended.complete
    assert ended.reason
    assert client.get_run(tracker.record.run_id).info.status == "FAILED"
    assert history(client, run, "train/loss") == [(1, 2.0)]


def test_a_run_killed_with_kill_9_goes_on_in_the_same_mlflow_run_without_duplicates(mlflow_workspace: Path, client) -> None:
    run = run_folder(mlflow_workspace)
    program = f"""
import os, signal
from pathlib import Path
from finetune.storage.rundir import RunDir
from finetune.tracking import open_run
run = RunDir(Path({str(run.root)!r}))
for step in range(5):
    run.metric(step, {{"train/loss": 1.0 / (step + 1), "train/images_per_second": 100.0 + step, "val/top1": step / 10}})
tracker = open_run(run, workspace=Path({str(mlflow_workspace)!r}), experiment="flowers", name="probe")
tracker.wait_for_run_id({SECONDS})
assert tracker.deliver() == ""
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=SECONDS).returncode == -signal.SIGKILL
    before = read_record(run)
    assert before is not None
    assert before.run_id is not None
    assert client.get_run(before.run_id).info.status == "RUNNING"
    # The resume goes back to its checkpoint at step 3 and computes steps 3 and 4 again, at another time and another speed.
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(lines[:3]))
    tracker = start(run, mlflow_workspace)
    for step in range(3, 7):
        run.metric(step, {"train/loss": 1.0 / (step + 1), "train/images_per_second": 50.0, "val/top1": step / 10})
    assert tracker.end("FINISHED", SECONDS).complete
    assert tracker.record.run_id == before.run_id
    assert history(client, run, "train/loss") == [(step, 1.0 / (step + 1)) for step in range(7)]
    assert history(client, run, "val/top1") == [(step, step / 10) for step in range(7)]
    assert [step for step, _ in history(client, run, "train/images_per_second")] == list(range(7))
    stored = client.get_run(before.run_id)
    assert (stored.info.status, stored.data.tags["finetune.attempts"]) == ("FINISHED", "2")
    assert len(client.search_runs([stored.info.experiment_id])) == 1


def test_a_final_evaluation_at_the_step_of_an_earlier_one_is_kept(mlflow_workspace: Path, client) -> None:
    run = run_folder(mlflow_workspace)
    run.metric(10, {"val/top1": 0.5})
    assert start(run, mlflow_workspace).end("KILLED", SECONDS).complete
    tracker = start(run, mlflow_workspace)
    run.metric(10, {"val/top1": 0.75})
    assert tracker.end("FINISHED", SECONDS).complete
    assert sorted(history(client, run, "val/top1")) == [(10, 0.5), (10, 0.75)]


def test_replaying_twice_changes_nothing(mlflow_workspace: Path, client) -> None:
    run = run_folder(mlflow_workspace)
    tracker = start(run, mlflow_workspace, params={"seed": 0})
    tracker.bundle("flower-model")
    run.metric(1, {"train/loss": 2.0, "train/lr": float("nan")})
    tracker.end("FINISHED", SECONDS)
    for _ in range(2):
        assert replay(run, mlflow_workspace).complete
    assert history(client, run, "train/loss") == [(1, 2.0)]
    assert len(history(client, run, "train/lr")) == 1
    assert len(client.search_model_versions("name = 'flower-model'")) == 1
    assert len(client.search_runs([client.get_run(tracker.record.run_id).info.experiment_id])) == 1


def test_a_run_whose_process_died_is_closed_by_a_replay_that_says_how_it_ended(mlflow_workspace: Path, client) -> None:
    run = run_folder(mlflow_workspace)
    tracker = start(run, mlflow_workspace)
    assert tracker.wait_for_run_id(SECONDS)
    assert replay(run, mlflow_workspace, "FAILED").complete
    assert client.get_run(tracker.record.run_id).info.status == "FAILED"


def test_the_runs_of_jobs_that_ended_without_telling_are_closed_by_a_worker(mlflow_workspace: Path, client) -> None:
    store = JobStore(open_database(mlflow_workspace / "jobs.db"))
    trackers = {}
    for state in ("failed", "cancelled"):
        job, _ = store.create("ada", {}, spec_digest="0" * 64)
        claim = store.claim("a worker that is gone")
        trackers[state] = start(run_folder(mlflow_workspace, job.id), mlflow_workspace)
        assert client.get_run(trackers[state].wait_for_run_id(60)).info.status == "RUNNING"
        store.finish(claim, state)
    store.create("ada", {}, spec_digest="0" * 64)
    store.request_cancel(store.list()[0][0].id)  # it never began
    Worker(store, LocalExecutor(), mlflow_workspace, WorkerSettings()).run(until_idle=True)
    ended = {state: client.get_run(tracker.record.run_id).info for state, tracker in trackers.items()}
    assert {state: info.status for state, info in ended.items()} == {"failed": "FAILED", "cancelled": "KILLED"}
    assert all(info.end_time for info in ended.values())


def test_a_run_that_was_deleted_in_mlflow_gets_a_new_one_with_everything(mlflow_workspace: Path, client) -> None:
    run = run_folder(mlflow_workspace)
    run.metric(1, {"train/loss": 2.0})
    first = start(run, mlflow_workspace)
    assert first.end("FINISHED", SECONDS).complete
    client.delete_run(first.record.run_id)
    assert replay(run, mlflow_workspace).complete
    record = read_record(run)
    assert record is not None
    assert record.run_id != first.record.run_id
    assert history(client, run, "train/loss") == [(1, 2.0)]
    assert "spec.yaml" in {entry.path for entry in client.list_artifacts(record.run_id)}


def test_a_run_of_an_experiment_that_was_deleted_in_mlflow_brings_it_back(mlflow_workspace: Path, client) -> None:
    first = start(run_folder(mlflow_workspace, "a"), mlflow_workspace)
    assert first.end("FINISHED", SECONDS).complete
    client.delete_experiment(client.get_run(first.record.run_id).info.experiment_id)
    second = start(run_folder(mlflow_workspace, "b"), mlflow_workspace)
    assert second.end("FINISHED", SECONDS).complete
    assert client.get_run(second.record.run_id).info.status == "FINISHED"


def test_a_run_whose_id_was_not_noted_before_a_kill_is_found_again(mlflow_workspace: Path, client) -> None:
    run = run_folder(mlflow_workspace)
    run.metric(1, {"train/loss": 2.0})
    first = start(run, mlflow_workspace)
    assert first.end("KILLED", SECONDS).complete
    write_json(run.root / "mlflow.json", {**read_json(run.root / "mlflow.json"), "run_id": None})
    second = start(run, mlflow_workspace)
    assert second.end("FINISHED", SECONDS).complete
    assert second.record.run_id == first.record.run_id
    assert history(client, run, "train/loss") == [(1, 2.0)]


def test_the_runs_of_a_comparison_are_children_of_one_run(mlflow_workspace: Path, client) -> None:
    parent = start(run_folder(mlflow_workspace, "parent"), mlflow_workspace)
    parent_id = parent.wait_for_run_id(SECONDS)
    assert parent_id
    child = start(run_folder(mlflow_workspace, "child"), mlflow_workspace, parent_run_id=parent_id)
    assert child.end("FINISHED", SECONDS).complete
    assert parent.end("FINISHED", SECONDS).complete
    assert client.get_run(child.record.run_id).data.tags["mlflow.parentRunId"] == parent_id


def test_params_keep_their_first_value_and_long_ones_are_cut(mlflow_workspace: Path, client) -> None:
    run = run_folder(mlflow_workspace)
    tracker = start(run, mlflow_workspace, params={"threads": 2, "classes": ["rose"] * 2000} | {f"p{i}": i for i in range(150)})
    assert tracker.end("KILLED", SECONDS).complete
    again = start(run, mlflow_workspace, params={"threads": 4, "new": "x"})
    assert again.end("FINISHED", SECONDS).complete
    params = client.get_run(again.record.run_id).data.params
    assert (params["threads"], params["new"], params["p149"], len(params)) == ("2", "x", "149", 153)
    assert len(params["classes"]) == 6000
    assert params["classes"].endswith("… (16000 characters)")


def test_more_points_than_one_batch_all_arrive(mlflow_workspace: Path, client) -> None:
    run = run_folder(mlflow_workspace)
    for step in range(1100):
        run.metric(step, {"train/loss": float(step)})
    with open(run.metrics, "a") as torn:
        torn.write('{"at": 1, "step": 9999, "val')
    assert start(run, mlflow_workspace).end("FINISHED", SECONDS).complete
    assert history(client, run, "train/loss") == [(step, float(step)) for step in range(1100)]


def test_a_server_that_is_not_there_costs_one_event_and_nothing_else(mlflow_workspace: Path, client, monkeypatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = run_folder(mlflow_workspace)
    tracker = start(run, mlflow_workspace, params={"seed": 0})
    assert tracker.wait_for_run_id(SECONDS) is None
    run.metric(1, {"train/loss": 2.0})
    ended = tracker.end("FINISHED", SECONDS)
    assert not ended.complete
    assert str(port) in ended.reason
    assert kinds(run) == ["mlflow_unavailable", "mlflow_incomplete"]
    assert "secret" not in run.events.read_text() + (run.root / "mlflow.json").read_text()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert replay(run, mlflow_workspace).complete
    assert history(client, run, "train/loss") == [(1, 2.0)]


def test_a_server_that_accepts_and_never_answers_does_not_hold_the_run_up(mlflow_workspace: Path, monkeypatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        run = run_folder(mlflow_workspace)
        tracker = start(run, mlflow_workspace)
        connection, _ = silent.accept()
        with connection:
            ended = tracker.end("FINISHED", timeout_seconds=0.1)
            assert (ended.complete, ended.reason) == (False, "no answer within 0.1 s")
            assert kinds(run) == ["mlflow_incomplete"]


def test_a_locked_database_delays_only_mlflow(mlflow_workspace: Path, client) -> None:
    run = run_folder(mlflow_workspace)
    tracker = start(run, mlflow_workspace)
    assert tracker.wait_for_run_id(SECONDS)
    lock = sqlite3.connect(mlflow_workspace / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    run.metric(1, {"train/loss": 2.0})
    tracker.params({"late": True})
    assert not tracker.end("FINISHED", timeout_seconds=0.1).complete
    lock.execute("ROLLBACK")
    lock.close()
    assert tracker.end("FINISHED", SECONDS).complete
    assert history(client, run, "train/loss") == [(1, 2.0)]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("a bug in a plugin"), KeyError("x")]
)
def test_whatever_mlflow_raises_the_run_goes_on_and_the_replay_completes_it(
    mlflow_workspace: Path, client, monkeypatch, error: Exception
) -> None:
    def fail(*_args, **_more) -> None:
        raise error

    run = run_folder(mlflow_workspace)
    run.metric(1, {"train/loss": 2.0})
    with monkeypatch.context() as broken:
        broken.setattr(mlflow.MlflowClient, "log_batch", fail)
        ended = start(run, mlflow_workspace, params={"seed": 0}).end("FINISHED", SECONDS)
    assert type(error).__name__ in ended.reason
    assert kinds(run)[0] == "mlflow_unavailable"
    assert replay(run, mlflow_workspace).complete
    assert history(client, run, "train/loss") == [(1, 2.0)]


def test_the_retired_file_store_is_named_as_the_reason_and_the_run_goes_on(mlflow_workspace: Path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///tmp/mlruns")
    run = run_folder(mlflow_workspace)
    ended = start(run, mlflow_workspace).end("FINISHED", SECONDS)
    assert "file store is not supported" in ended.reason
    assert kinds(run)[0] == "mlflow_unavailable"


def test_two_first_runs_at_once_make_one_database_and_a_half_made_one_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".mlflow.db.new").write_bytes(b"left by a process that was killed while migrating")
    runs = [run_folder(tmp_path, name) for name in ("a", "b")]
    trackers = [start(run, tmp_path) for run in runs]
    assert [tracker.end("FINISHED", SECONDS).complete for tracker in trackers] == [True, True]
    client = mlflow.MlflowClient(destination(tmp_path).uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "flowers"]
    assert len(client.search_runs([experiment.experiment_id])) == 2
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()
    assert not (tmp_path / ".mlflow.db.new").exists()


def test_nothing_is_written_outside_the_workspace(mlflow_workspace: Path, tmp_path: Path, monkeypatch) -> None:
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert start(run_folder(mlflow_workspace), mlflow_workspace).end("FINISHED", SECONDS).complete
    assert list(elsewhere.iterdir()) == []


def test_replaying_a_folder_that_was_never_tracked_says_so(tmp_path: Path) -> None:
    assert "never tracked" in replay(RunDir(tmp_path), tmp_path).reason


def test_no_tracker_does_as_little_as_it_says(tmp_path: Path) -> None:
    tracker = NoTracker()
    tracker.params({"a": 1})
    tracker.bundle("x")
    assert tracker.wait_for_run_id(0) is None
    assert tracker.end("FINISHED").complete


def test_importing_the_module_does_not_import_mlflow() -> None:
    program = "import sys, finetune.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=SECONDS).returncode == 0


def test_the_pages_are_for_this_machine_with_one_worker_and_no_job_runner(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command = ui_command(tmp_path, "127.0.0.1", 5123)
    words = " ".join(command.arguments)
    assert f"--backend-store-uri sqlite:///{tmp_path}/mlflow.db" in words
    assert "--host 127.0.0.1 --port 5123 --workers 1" in words
    assert "127.0.0.1:5123" in words
    assert command.environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert command.environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert command.url == "http://127.0.0.1:5123"
    page = "http://127.0.0.1:5123/#/experiments/1/runs/abc?workflowType=machine_learning"
    assert run_url(command.url, "1", "abc") == page
    with pytest.raises(InvalidInput, match="this machine only"):
        ui_command(tmp_path, "0.0.0.0", 5000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example")
    with pytest.raises(InvalidInput, match=r"https://\*\*\*@mlflow.example is a server already"):
        ui_command(tmp_path, "127.0.0.1", 5000)


def test_the_environment_decides_where_mlflow_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert destination(Path("here")).uri == f"sqlite:///{tmp_path}/here/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert destination(Path("here")).artifact_root is None
    assert os.path.isabs(destination(Path("here")).uri) is False
