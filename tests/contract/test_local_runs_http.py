"""Runs and comparisons of the command line over HTTP: listed for the operator, beside those of jobs and not among them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import in_process, until
from starlette.testclient import TestClient

from finetune.jobs.database import open_jobs
from finetune.jobs.keys import KeyStore
from finetune.storage.files import write_json
from finetune.storage.rundir import RunDir

VERDICT = {"choose": "full", "outcome": "better", "sentence": "full is better.", "pareto": ["full"], "margin": 0.01}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    runs = tmp_path / "runs"
    trained = RunDir(runs / "photos-full-1").create()
    metrics = {"test/top1": 0.9, "cost/wall_seconds": 12.0}
    write_json(trained.outcome, {"carried_out": "full", "metrics": metrics, "model": "photos", "version": "3"})
    trained.report.write_text(f"<title>{trained.root}</title>")
    compared = RunDir(runs / "photos-compare-1").create()
    write_json(compared.comparison, {"verdict": VERDICT, "registered": None})
    write_json(RunDir(runs / "ftjob-1").create().outcome, {"carried_out": "full", "metrics": {}})
    RunDir(runs / "unfinished").create()
    os.utime(trained.outcome, (2_000, 2_000))
    os.utime(compared.comparison, (1_000, 1_000))
    with in_process(tmp_path, wait=False) as client:
        yield client


def test_what_the_command_line_made_is_listed_newest_first_in_pages(client: TestClient) -> None:
    first, second = client.get("/v1/runs").json()["data"]
    assert first == {
        "id": "photos-full-1", "object": "run", "kind": "training", "finished_at": 2_000, "method": "full",
        "metrics": {"test/top1": 0.9}, "verdict": None, "model": "photos", "version": "3",
        "links": {"report": "/v1/runs/photos-full-1/report"},
    }  # fmt: skip
    assert (second["id"], second["kind"], second["verdict"], second["model"]) == ("photos-compare-1", "comparison", VERDICT, None)
    page = client.get("/v1/runs", params={"limit": 1}).json()
    assert (page["has_more"], page["last_id"]) == (True, "photos-full-1")
    rest = client.get("/v1/runs", params={"after": "photos-full-1"}).json()
    assert [one["id"] for one in rest["data"]] == ["photos-compare-1"]
    assert client.get("/v1/runs", params={"after": "nothing"}).status_code == 404


def test_its_report_is_shown_without_local_paths(client: TestClient, tmp_path: Path) -> None:
    answer = client.get("/v1/runs/photos-full-1/report")
    assert answer.status_code == 200
    assert "runs/photos-full-1" in answer.text
    assert str(tmp_path) not in answer.text
    for name in ("photos-compare-1", "ftjob-1", "unfinished", "..", "nothing"):
        assert client.get(f"/v1/runs/{name}/report").status_code == 404, name


def test_it_belongs_to_the_operator(client: TestClient, tmp_path: Path) -> None:
    keys = KeyStore(open_jobs(tmp_path))
    submitter, admin = ({"Authorization": f"Bearer {keys.create(scope, (scope,))[0]}"} for scope in ("jobs", "admin"))
    until(lambda: client.get("/v1/runs").status_code == 401)
    for path in ("/v1/runs", "/v1/runs/photos-full-1/report"):
        assert client.get(path, headers=submitter).status_code == 403
        assert client.get(path, headers=admin).status_code == 200
