"""`finetune mlflow` starts MLflow's pages for this machine alone, and its links open exactly at a run or comparison."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from click.testing import CliRunner
from run_folders import whole_comparison, whole_run

from finetune.cli import cli
from finetune.errors import InvalidInput, MissingExtra, NotFound
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking.mirror import tracked_as
from finetune.tracking.mlflow import pages
from finetune.tracking.mlflow.connection import destination_of
from finetune.tracking.mlflow.pages import Link, is_healthy, links_to, server_command, show_pages

RUN, COMPARISON = "a" * 32, "b" * 32
VIEW = {"key": f"mlflow.sharedViewState.{COMPARISON}", "value": "{}"}
EXPERIMENT_VIEW = {"key": "mlflow.sharedViewState.finetune", "value": "{}"}


class StandIn(BaseHTTPRequestHandler):
    """Answers what MLflow's server answers about two runs in one experiment, which `experiments` may replace."""

    experiments: Mapping[str, Any] = {"7": {"experiment_id": "7", "name": "flowers", "tags": [VIEW, EXPERIMENT_VIEW]}}

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        what = url.path.removeprefix("/api/2.0/mlflow/")
        if url.path == "/health":
            return self.answer(200, b"OK")
        if what == "runs/get" and query["run_id"] in (RUN, COMPARISON):
            return self.answer(200, json.dumps({"run": {"info": {"experiment_id": "7"}}}).encode())
        if what == "experiments/get":
            return self.answer(200, json.dumps({"experiment": self.experiments[query["experiment_id"]]}).encode())
        if what == "experiments/search":
            found = [{"experiment_id": "0", "name": "Default"}, *self.experiments.values()]
            return self.answer(200, json.dumps({"experiments": found}).encode())
        return self.answer(404, b"{}")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_the_pages_are_for_this_machine_with_one_worker_and_no_job_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    target = destination_of(Workspace.at(tmp_path))
    command = server_command(target, "127.0.0.1", 5123)
    words = " ".join(command.arguments)
    assert f"--backend-store-uri sqlite:///{tmp_path}/mlflow.db" in words
    assert "--host 127.0.0.1 --port 5123 --workers 1" in words
    assert "127.0.0.1:5123" in words
    assert command.environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert command.environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert command.url == "http://127.0.0.1:5123"
    assert server_command(target, "::1", 5123).url == "http://[::1]:5123"
    with pytest.raises(InvalidInput, match="this machine only"):
        server_command(target, "0.0.0.0", 5000)
    monkeypatch.setattr(pages.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"finetune-images\[train\]"):
        server_command(target, "127.0.0.1", 5000)


def test_the_environment_decides_where_mlflow_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace.at(tmp_path / "per%20cent")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert destination_of(workspace).uri == f"sqlite:///{tmp_path}/per%2520cent/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example")
    assert destination_of(workspace).artifact_root is None
    assert destination_of(workspace).shown == "https://***@mlflow.example"
    assert destination_of(workspace, "postgresql://elsewhere/db").uri == "postgresql://elsewhere/db"


def test_a_link_to_a_run_is_its_page_in_the_view_for_training(server: str) -> None:
    (link,) = links_to(server, RUN)
    assert link.url == f"{server}/#/experiments/7/runs/{RUN}?workflowType=machine_learning"


def test_a_link_to_a_comparison_is_the_charts_of_its_runs(server: str) -> None:
    charts, table, page = links_to(server, COMPARISON)
    assert charts.url == (
        f"{server}/#/experiments/7/runs?viewStateShareKey={COMPARISON}&workflowType=machine_learning&compareRunsMode=CHART"
    )
    assert table.url == f"{server}/#/experiments/7/runs?viewStateShareKey={COMPARISON}&workflowType=machine_learning"
    assert page.url.endswith(f"/runs/{COMPARISON}?workflowType=machine_learning")


def test_without_a_run_the_only_experiment_opens_or_the_list_of_all(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (only,) = links_to(server, None)
    assert only == Link(
        "the runs on flowers", f"{server}/#/experiments/7/runs?viewStateShareKey=finetune&workflowType=machine_learning"
    )
    monkeypatch.setattr(StandIn, "experiments", {**StandIn.experiments, "8": {"experiment_id": "8", "name": "cars"}})
    (every,) = links_to(server, None)
    assert every == Link("all experiments", f"{server}/#/experiments?workflowType=machine_learning")


def test_a_server_that_shows_another_database_is_told(server: str) -> None:
    with pytest.raises(NotFound, match="it shows another database"):
        links_to(server, "c" * 32)


def test_a_server_elsewhere_is_opened_and_none_is_started(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setattr(pages, "_has_browser", lambda: True)
    opened: list[str] = []
    monkeypatch.setattr(pages.webbrowser, "open", opened.append)
    told: list[Link] = []
    show_pages(Workspace.at(tmp_path), RUN, "127.0.0.1", 5000, told.append, browse=True)
    assert opened == [told[0].url]
    assert f"/runs/{RUN}" in opened[0]


def test_pages_that_are_shown_already_are_not_started_again(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    told: list[Link] = []
    port = int(server.rpartition(":")[2])
    show_pages(Workspace.at(tmp_path), COMPARISON, "127.0.0.1", port, told.append, browse=False)
    assert len(told) == 3
    assert is_healthy(server)
    assert not is_healthy("http://127.0.0.1:9")


# -- the command


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["mlflow", *arguments])


def test_what_mlflow_missed_is_sent_by_a_command(mlflow_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(mlflow_workspace))
    run = RunDir(mlflow_workspace / "runs" / "a")
    whole_run(run)
    assert json.loads(invoke("sync", "--json").stdout) == {"runs": [], "models": []}  # it was not to be tracked
    document = json.loads(invoke("sync", "a", "--json").stdout)
    assert document["runs"] == [{"run": str(run.root), "mlflow_run_id": tracked_as(run, "mlflow"), "missing": ""}]
    said = invoke("sync", str(run.root))
    assert said.exit_code == 0
    assert f"a: complete, run {tracked_as(run, 'mlflow')}" in said.stderr


def test_a_run_that_cannot_be_sent_is_an_exit_code_of_1(mlflow_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(mlflow_workspace))
    run = RunDir(mlflow_workspace / "runs" / "a")
    whole_run(run)
    monkeypatch.setattr("finetune.tracking.sync.mirroring_lock", lambda *_, **__: _Busy())
    said = invoke("sync", "a")
    assert said.exit_code == 1
    assert "a: not complete: another process is mirroring it" in said.stderr


class _Busy:
    def __enter__(self) -> bool:
        return False

    def __exit__(self, *_: object) -> None: ...


def test_a_comparison_that_mlflow_lacks_is_sent_before_it_is_opened(
    server: str, mlflow_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(mlflow_workspace))
    run = RunDir(mlflow_workspace / "runs" / "cmp")
    whole_comparison(run, seeds=1)
    shown: list[str | None] = []
    monkeypatch.setattr(pages, "show_pages", lambda _workspace, run_id, *_given, **_more: shown.append(run_id))
    assert invoke("cmp", "--no-browser").exit_code == 0
    assert shown == [tracked_as(run, "mlflow")]
    assert shown[0] is not None
    assert invoke(RUN).exit_code == 0
    assert invoke("--port", "5001").exit_code == 0
    assert invoke().exit_code == 0
    assert shown[1:] == [RUN, None, None]


def test_what_is_no_run_is_told_with_the_runs_that_there_are(mlflow_workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(mlflow_workspace))
    whole_run(RunDir(mlflow_workspace / "runs" / "a-run"))
    done = invoke("sync", "a-rum")
    assert isinstance(done.exception, NotFound)
    assert "no run 'a-rum'" in str(done.exception)
    assert "a-run" in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "server"), [(["mlflow"], "finetune.tracking.mlflow.pages.show_pages"), (["demo"], "finetune.demo.run_demo")]
)
def test_sigterm_stops_a_command_with_a_server_as_ctrl_c_does(
    arguments: list[str], server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = []

    def serve(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            interrupted.append(True)
            raise

    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path))
    monkeypatch.setattr(server, serve)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        CliRunner().invoke(cli, arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert interrupted == [True]
