"""What MLflow shows of a run: params, figures, datasets, files, a description, the model; and what its troubles do not harm."""

from __future__ import annotations

import errno
import json
import socket
import sqlite3
import threading
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest
from run_folders import begin_run, end_run, registered_run, spec_of, train_steps, whole_comparison, whole_run, whole_study
from tiny_bundle import self_test_files

from finetune.bundle.predictor import Predictor
from finetune.storage.files import read_json, write_json
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking.mirror import Mirror, read_state, tracked_as
from finetune.tracking.mlflow.tracker import MlflowTracker
from finetune.tracking.sync import find_run, in_order, incomplete_runs, sync_run
from finetune.tracking.tracker import Choice, Place
from finetune.tracking.view import RunView, experiment_name, read_view

MLFLOW = Choice("mlflow")
METHODS: tuple[Any, ...] = (
    "linear_probe",
    "partial",
    {"type": "partial", "train": ["layer1", "layer3"]},
    "full",
    "gradual",
)


@pytest.fixture
def workspace(mlflow_workspace: Path) -> Workspace:
    return Workspace.at(mlflow_workspace)


@pytest.fixture
def client(workspace: Workspace) -> mlflow.MlflowClient:
    uri = f"sqlite:///{workspace.mlflow_database}"
    return mlflow.MlflowClient(uri, registry_uri=uri)


def run_at(workspace: Workspace, name: str = "a") -> RunDir:
    return RunDir(workspace.runs / name)


def mirror(run: RunDir, workspace: Workspace, *, experiment: str = "flowers", **how: Any) -> str:
    return Mirror(run, MLFLOW, workspace, experiment).update(**{"alive": False, **how})


def stored(client: mlflow.MlflowClient, run: RunDir) -> mlflow.entities.Run:
    run_id = tracked_as(run, "mlflow")
    assert run_id is not None
    return client.get_run(run_id)


def tags_of(client: mlflow.MlflowClient, run: RunDir) -> Mapping[str, str]:
    tags: Mapping[str, str] = client.get_experiment(stored(client, run).info.experiment_id).tags
    return tags


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_params_are_what_was_carried_out_under_plain_names_few_enough_to_read(
    workspace: Workspace, client: mlflow.MlflowClient, method: Any
) -> None:
    run = run_at(workspace)
    whole_run(run, method, data={"folds": 5})
    assert mirror(run, workspace) == ""
    params = stored(client, run).data.params
    assert len(params) <= 25
    assert params["method"] == (method if isinstance(method, str) else method["type"])
    assert not [key for key, value in params.items() if value == "auto" or "." in key]
    assert not [value for value in params.values() if len(value) > 40]
    assert {"trains", "backbone", "weights", "input_size_px", "seed", "split_seed", "device", "folds"} <= params.keys()


def test_what_is_not_decided_yet_is_no_param_until_it_is(workspace: Workspace, client: mlflow.MlflowClient) -> None:
    run = run_at(workspace)
    resolved = begin_run(run, spec_of("linear_probe"))
    assert mirror(run, workspace, alive=True) == ""
    assert "l2" not in stored(client, run).data.params
    end_run(run, resolved)
    assert mirror(run, workspace) == ""
    assert stored(client, run).data.params["l2"] == "10"


def test_a_figure_has_one_value_at_step_0_and_a_course_has_another_name(
    workspace: Workspace, client: mlflow.MlflowClient
) -> None:
    """MLflow draws bars for a metric that has only step 0, and a line for one that has a later step in any run."""
    run = run_at(workspace)
    whole_run(run, top1=0.875)
    assert mirror(run, workspace) == ""
    found = stored(client, run)
    histories = {key: client.get_metric_history(found.info.run_id, key) for key in found.data.metrics}
    final = {key: points for key, points in histories.items() if not key.startswith(("train/", "weights/", "system/"))}
    assert {
        "test/top1",
        "test/top1_low",
        "test/top1_high",
        "test/n",
        "val/top1",
        "train_seconds",
        "peak_memory_mib",
    } <= final.keys()
    assert {key: [point.step for point in points] for key, points in final.items()} == {key: [0] for key in final}
    assert final["peak_memory_mib"][0].value == 1024.0
    assert [point.value for point in histories["train/val_top1"]] == [0.0, 0.1, 0.2]
    assert [point.value for point in histories["train/epoch"]] == [0.0, 1.0, 2.0]
    assert "weights/grad_norm/stage0" in histories


def test_what_a_run_is_judged_by_comes_first_also_while_nothing_is_known(
    workspace: Workspace, client: mlflow.MlflowClient
) -> None:
    """MLflow's pages list metrics in the order in which they came, and compare runs by the first."""
    run = run_at(workspace)
    run.create().spec.write_text(spec_of("full").to_yaml())
    assert mirror(run, workspace, alive=True) == ""
    assert stored(client, run).data.metrics == {}
    resolved = begin_run(run, spec_of("full"))
    train_steps(run, range(2))
    assert mirror(run, workspace, alive=True) == ""
    first, *others = stored(client, run).data.metrics.items()
    assert first[0] == "test/top1"
    assert first[1] != first[1]  # not measured yet
    assert {"train/loss", "system/cpu_utilization_percentage"} <= set(dict(others))
    end_run(run, resolved, top1=0.75)
    assert mirror(run, workspace) == ""
    assert next(iter(stored(client, run).data.metrics.items())) == ("test/top1", 0.75)


def test_what_a_run_is_judged_by_comes_first_also_if_it_trains_while_mlflow_is_being_connected(
    workspace: Workspace, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first connection takes seconds, in which a run that had only begun resolves its job and takes its first steps."""
    run = run_at(workspace)
    run.create().spec.write_text(spec_of("full").to_yaml())
    begin = MlflowTracker.begin

    def slow_begin(tracker: MlflowTracker, view: RunView, place: Place) -> tuple[str, bool]:
        begun = begin(tracker, view, place)
        begin_run(run, spec_of("full"))
        train_steps(run, range(2))
        return begun

    monkeypatch.setattr(MlflowTracker, "begin", slow_begin)
    assert mirror(run, workspace, alive=True) == ""
    monkeypatch.undo()
    assert stored(client, run).data.metrics == {}
    assert mirror(run, workspace, alive=True) == ""
    assert next(iter(stored(client, run).data.metrics)) == "test/top1"
    assert "train/loss" in stored(client, run).data.metrics


def test_each_split_is_an_input_with_its_context_and_the_digest_of_the_manifest(
    workspace: Workspace, client: mlflow.MlflowClient
) -> None:
    run = run_at(workspace)
    whole_run(run)
    assert mirror(run, workspace) == ""
    inputs = {entry.dataset.name: entry for entry in stored(client, run).inputs.dataset_inputs}
    assert {name: entry.tags[0].value for name, entry in inputs.items()} == {
        "flowers train": "training",
        "flowers val": "validation",
        "flowers test": "test",
    }
    digest = tags_of_run(client, run)["finetune.dataset"]
    assert {entry.dataset.digest for entry in inputs.values()} == {digest[:36]}
    profile = json.loads(inputs["flowers train"].dataset.profile)
    assert (profile["num_rows"], profile["manifest_sha256"]) == (63, digest)
    assert sum(profile["classes"].values()) == 63


def tags_of_run(client: mlflow.MlflowClient, run: RunDir) -> Mapping[str, str]:
    tags: Mapping[str, str] = stored(client, run).data.tags
    return tags


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("partial", "partial, resnet18"),
        ({"type": "partial", "stages": 2}, "partial 2 stages, resnet18"),
        ({"type": "partial", "train": ["layer1", "layer3"]}, "partial layer1+layer3, resnet18"),
    ],
)
def test_a_name_says_what_is_unusual_about_a_method(method: Any, name: str, workspace: Workspace) -> None:
    run = run_at(workspace)
    run.create().spec.write_text(spec_of(method).to_yaml())
    assert read_view(run, alive=True).name == name


def test_names_files_and_times_are_the_runs(workspace: Workspace, client: mlflow.MlflowClient) -> None:
    run = run_at(workspace)
    whole_run(run, "full", seed=3, metadata={"team": "botany", "mlflow.user": "nobody"})
    assert mirror(run, workspace) == ""
    found = stored(client, run)
    assert found.info.run_name == "full, resnet18, seed 3"
    assert found.info.status == "FINISHED"
    assert found.info.end_time - found.info.start_time == pytest.approx(20_000, abs=1000)
    assert (found.data.tags["team"], found.data.tags["finetune.run"]) == ("botany", "a")
    assert found.data.tags["mlflow.user"] != "nobody"
    names = {entry.path for entry in client.list_artifacts(found.info.run_id)}
    assert names == {"spec.yaml", "resolved.json", "split.csv", "report.html", "figures"}
    run.report.write_text("<html>written again</html>")
    assert mirror(run, workspace) == ""
    again = Path(client.download_artifacts(found.info.run_id, "report.html"))
    assert again.read_text() == "<html>written again</html>"


@pytest.mark.parametrize(("how", "status"), [({}, "KILLED"), ({"ended_as": "FAILED"}, "FAILED")])
def test_a_run_that_ended_without_a_word_is_closed(
    workspace: Workspace, client: mlflow.MlflowClient, how: Mapping[str, Any], status: str
) -> None:
    run = run_at(workspace)
    begin_run(run, spec_of("full"))
    assert mirror(run, workspace, alive=True) == ""
    assert stored(client, run).info.status == "RUNNING"
    assert mirror(run, workspace, **how) == ""
    assert stored(client, run).info.status == status
    assert mirror(run, workspace, alive=True) == ""  # and goes on again
    assert stored(client, run).info.status == "RUNNING"


def test_a_run_that_failed_says_why(workspace: Workspace, client: mlflow.MlflowClient) -> None:
    run = run_at(workspace)
    begin_run(run, spec_of("full"))
    problem = {"where": "3.jpg", "message": "is cut short"}
    write_json(run.error, {"code": "data_error", "message": "one file cannot be read", "problems": [problem]})
    assert mirror(run, workspace) == ""
    found = stored(client, run)
    assert found.info.status == "FAILED"
    assert "**data_error**: one file cannot be read" in found.data.tags["mlflow.note.content"]
    assert "- 3.jpg: is cut short" in found.data.tags["mlflow.note.content"]


def test_a_study_is_a_run_with_nested_runs_and_a_view_of_them(workspace: Workspace, client: mlflow.MlflowClient) -> None:
    run = run_at(workspace, "study")
    whole_study(run)
    assert mirror(run, workspace) == ""
    parent = stored(client, run)
    nested = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {one.info.run_name for one in nested} == {"linear_probe", "full"}
    assert parent.data.params["method"] == "full"  # what auto chose
    assert "train/loss" not in parent.data.metrics  # a study has results, its runs have courses
    view = json.loads(tags_of(client, run)[f"mlflow.sharedViewState.{parent.info.run_id}"])
    assert view["searchFilter"] == f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    assert "groupBy" not in view


def test_a_comparison_shows_its_arms_as_groups_and_its_page(workspace: Workspace, client: mlflow.MlflowClient) -> None:
    run = run_at(workspace, "comparison")
    whole_comparison(run)
    assert mirror(run, workspace) == ""
    parent = stored(client, run)
    assert parent.info.run_name == "linear_probe vs full"
    assert "method" not in parent.data.params  # in which the arms differ
    assert parent.data.params["backbone"] == "resnet18"
    nested = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    arms = {(one.info.run_name, one.data.tags["finetune.arm"], one.data.params["seed"]) for one in nested}
    assert arms == {
        ("linear-probe, seed 0", "linear-probe", "0"),
        ("linear-probe, seed 1", "linear-probe", "1"),
        ("full, seed 0", "full", "0"),
        ("full, seed 1", "full", "1"),
    }
    assert {"report.html", "comparison.json"} <= {entry.path for entry in client.list_artifacts(parent.info.run_id)}
    note = parent.data.tags["mlflow.note.content"]
    assert "| full | 2 | 0.9000 (0.8000 to 1.0000, n 14) | 12.5 s | 1.0 MiB |" in note
    assert "| full − linear_probe | test/top1 | +0.1000 | +0.0200 to +0.1800 | 0.02 |" in note
    view = json.loads(tags_of(client, run)[f"mlflow.sharedViewState.{parent.info.run_id}"])
    assert view["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "finetune.arm"}]
    assert view["selectedColumns"][0] == "metrics.`test/top1`"


def test_an_experiment_opens_on_its_runs_with_columns_of_figures(workspace: Workspace, client: mlflow.MlflowClient) -> None:
    run = run_at(workspace)
    whole_run(run)
    assert mirror(run, workspace) == ""
    tags = tags_of(client, run)
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    columns = json.loads(tags["mlflow.sharedViewState.finetune"])["selectedColumns"]
    assert {"metrics.`test/top1`", "metrics.`test/n`", "metrics.`train_seconds`", "params.`method`"} <= set(columns)


@pytest.mark.parametrize(
    ("training_file", "suffix", "name"),
    [
        ("/data/flowers", None, "flowers"),
        ("/data/flowers.zip", None, "flowers"),
        ("/data/flowers.tar.gz", "rose-model", "flowers"),
        ("/data/labels.csv", None, "labels.csv"),
        (f"/srv/files/file-{'0' * 26}", "rose-model", "rose-model"),
        (f"/srv/files/file-{'0' * 26}", None, f"file-{'0' * 26}"),
    ],
)
def test_experiments_are_named_after_the_data(training_file: str, suffix: str | None, name: str) -> None:
    assert experiment_name(spec_of(training_file=training_file, suffix=suffix)) == name


def test_the_data_of_an_upload_is_called_as_people_know_it(workspace: Workspace, client: mlflow.MlflowClient) -> None:
    run, upload = run_at(workspace), f"file-{'0' * 26}"
    end_run(run, begin_run(run, spec_of(training_file=f"/srv/{upload}"), dataset=upload))
    assert mirror(run, workspace, experiment="roses") == ""
    found = stored(client, run)
    assert {entry.dataset.name for entry in found.inputs.dataset_inputs} == {"roses train", "roses val", "roses test"}
    assert client.get_experiment(found.info.experiment_id).name == "roses"


# -- the model


def test_the_bundle_is_a_model_of_the_run_with_its_figures_on_its_data(workspace: Workspace, client: mlflow.MlflowClient) -> None:
    run = run_at(workspace)
    registered_run(run, workspace, top1=0.875)
    assert mirror(run, workspace) == ""
    (output,) = stored(client, run).outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, str(model.status)) == ("flowers", "READY")
    assert model.params["method"] == "full"
    figures = {(metric.key, metric.dataset_name): metric.value for metric in model.metrics}
    assert figures["test/top1", "flowers test"] == 0.875
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "flowers", "version": "1"}]


def test_costs_that_change_after_the_run_has_ended_replace_those_that_mlflow_has(
    workspace: Workspace, client: mlflow.MlflowClient
) -> None:
    """A comparison exports and registers the run that it chooses after that run has ended, which costs more time."""
    run = run_at(workspace)
    registered_run(run, workspace)
    assert mirror(run, workspace) == ""
    outcome = read_json(run.outcome)
    for seconds in (outcome["cost"]["wall_seconds"] + 7, outcome["cost"]["wall_seconds"] - 1):
        write_json(run.outcome, {**outcome, "cost": {**outcome["cost"], "wall_seconds": seconds}})
        assert mirror(run, workspace) == ""
        found = stored(client, run)
        (output,) = found.outputs.model_outputs
        newest = max(
            (metric for metric in client.get_logged_model(output.model_id).metrics if metric.key == "wall_seconds"),
            key=lambda metric: metric.timestamp,
        )
        assert (found.data.metrics["wall_seconds"], newest.value) == (seconds, seconds)


def test_what_is_downloaded_of_a_version_is_a_bundle_that_answers(
    workspace: Workspace, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    run = run_at(workspace)
    outcome = registered_run(run, workspace)
    assert mirror(run, workspace) == ""
    folder = mlflow.artifacts.download_artifacts("models:/flowers@champion", dst_path=str(tmp_path / "downloaded"))
    image = self_test_files()[0]
    assert outcome.bundle is not None
    assert Predictor.load(Path(folder)).predict(image).labels == Predictor.load(outcome.bundle).predict(image).labels
    version = client.get_model_version_by_alias("flowers", "champion")
    assert (str(version.version), version.run_id) == ("1", tracked_as(run, "mlflow"))
    assert "test/top1 0.9000 (0.8000 to 1.0000, n 14)" in version.description


# -- trouble


def test_a_server_that_is_not_there_is_named_without_its_password_and_misses_nothing_in_the_end(
    workspace: Workspace, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_at(workspace)
    whole_run(run)
    with socket.socket() as closed, monkeypatch.context() as away:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        port = closed.getsockname()[1]
        away.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{port}")
        away.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        reason = mirror(run, workspace)
    assert str(port) in reason
    assert "secret" not in reason + (run.tracking / "mlflow.json").read_text()
    assert incomplete_runs(workspace, "mlflow") == [run]
    assert sync_run(run, MLFLOW, workspace).reason == ""
    assert incomplete_runs(workspace, "mlflow") == []
    assert stored(client, run).info.status == "FINISHED"


@pytest.mark.slow  # SQLite and MLflow wait for the lock, and try again
def test_a_locked_database_is_written_by_the_next_update(
    workspace: Workspace, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_at(workspace)
    begin_run(run, spec_of("full"))
    follower = Mirror(run, MLFLOW, workspace, "flowers")
    assert follower.update(alive=True) == ""
    train_steps(run, range(1))
    monkeypatch.setattr("finetune.tracking.mirror.MOST_FAILURES", 1)
    lock = sqlite3.connect(workspace.mlflow_database, isolation_level=None)
    with closing(lock):
        lock.execute("BEGIN EXCLUSIVE")
        assert "database is locked" in follower.update(alive=True)
        lock.execute("ROLLBACK")
    assert follower.update(alive=True) == ""
    assert [point.step for point in client.get_metric_history(tracked_as(run, "mlflow"), "train/loss")] == [0]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("a bug in a plugin"), KeyError("x")]
)
def test_whatever_mlflow_raises_is_a_reason_and_the_next_update_completes_it(
    workspace: Workspace, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_args: object, **_more: object) -> None:
        raise error

    run = run_at(workspace)
    whole_run(run)
    with monkeypatch.context() as broken:
        broken.setattr(mlflow.MlflowClient, "log_batch", fail)
        assert type(error).__name__ in mirror(run, workspace)
    assert mirror(run, workspace) == ""
    assert len(client.get_metric_history(tracked_as(run, "mlflow"), "train/loss")) == 3


def test_the_retired_file_store_is_named_as_the_reason(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///tmp/mlruns")
    run = run_at(workspace)
    whole_run(run)
    assert "file store is not supported" in mirror(run, workspace)


def test_an_experiment_that_was_deleted_is_brought_back(workspace: Workspace, client: mlflow.MlflowClient) -> None:
    first, second = run_at(workspace), run_at(workspace, "b")
    whole_run(first)
    whole_run(second)
    assert mirror(first, workspace) == ""
    client.delete_experiment(stored(client, first).info.experiment_id)
    assert mirror(second, workspace) == ""
    assert stored(client, second).info.status == "FINISHED"


@pytest.mark.parametrize(
    "name",
    [pytest.param("plain", marks=pytest.mark.slow), "per%20cent and ?mark #1"],  # MLflow's migrations take seconds
)
def test_the_database_is_made_in_the_workspace_whatever_its_path_and_a_half_made_one_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mlflow_database: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    workspace = Workspace.at(tmp_path / name)
    run = run_at(workspace)
    whole_run(run)
    if name == "plain":
        (workspace.root / ".mlflow.db.new").write_bytes(b"left by a process that was killed while migrating")
    else:
        workspace.root.mkdir(exist_ok=True)
        workspace.mlflow_database.write_bytes(mlflow_database.read_bytes())
    assert mirror(run, workspace) == ""
    assert {path.name for path in tmp_path.iterdir()} == {"cwd", name}
    assert list(elsewhere.iterdir()) == []
    names = {path.name for path in workspace.root.iterdir()}
    assert {"mlflow.db", "mlartifacts", "runs"} <= names
    assert ".mlflow.db.new" not in names


def test_two_first_runs_at_once_share_an_experiment(workspace: Workspace, client: mlflow.MlflowClient) -> None:
    runs = [run_at(workspace, name) for name in ("a", "b")]
    for run in runs:
        whole_run(run)
    reasons: list[str] = []
    threads = [threading.Thread(target=lambda run=run: reasons.append(mirror(run, workspace))) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reasons == ["", ""]
    assert len({stored(client, run).info.experiment_id for run in runs}) == 1


# -- synchronising


def test_runs_are_found_by_folder_and_by_name_and_put_in_the_order_of_their_ends(workspace: Workspace) -> None:
    first, second = run_at(workspace, "z"), run_at(workspace, "a")
    whole_run(first)
    whole_run(second)
    assert find_run("z", workspace) == first
    assert find_run(str(second.root), workspace) == second
    assert in_order([second, first]) == [first, second]


def test_synchronising_one_run_of_a_study_sends_the_study(workspace: Workspace) -> None:
    run = run_at(workspace, "study")
    whole_study(run)
    done = sync_run(run.child("full"), MLFLOW, workspace)
    assert done.reason == ""
    assert done.run_id == tracked_as(run.child("full"), "mlflow")
    assert set(read_state(run, "mlflow").runs) == {".", "runs/linear_probe", "runs/full"}  # type: ignore[union-attr]
