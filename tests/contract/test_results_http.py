"""Everything that a result holds can be read over HTTP: versions, reports, bundles, results of jobs, the documentation."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from archives import photographs, zip_of
from diagnosed import neighbours, run_records, write_run
from run_folders import begin_run, end_run, resolved_of, spec_of
from serving import in_process, live_server, registered
from standin import picture, write_bundle
from starlette.testclient import TestClient

import finetune
from finetune.bundle.predictor import Predictor
from finetune.client import Client, JobFailed, RequestRefused
from finetune.errors import Conflict
from finetune.evaluation.diagnose import diagnose
from finetune.jobs.database import open_jobs
from finetune.jobs.store import JobStore
from finetune.spec.sections import Hyperparameters
from finetune.storage.files import modified_ns, write_json
from finetune.storage.rundir import RunDir
from service.results import resolved_hyperparameters, run_of

pytestmark = pytest.mark.usefixtures("uploads_read_here")

JOBS = "/v1/fine_tuning/jobs"
SPLIT = {"n": 40, "top1": 0.9, "top1_interval": [0.76, 0.97], "confusion": [[18, 2], [2, 18]]}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    registered(tmp_path, write_bundle(tmp_path / "bundle"))
    with in_process(tmp_path) as client:
        yield client


def finished_job(client: TestClient | httpx.Client, home: Path) -> str:
    """The id of a job that a worker has carried out, with what its run writes."""
    file = client.post("/v1/files", files={"file": ("photos.zip", zip_of(photographs()))}, data={"purpose": "fine-tune"}).json()
    job_id = client.post(JOBS, json={"training_file": file["id"], "suffix": "mine"}).json()["id"]
    store = JobStore(open_jobs(home))
    claim = store.claim("worker")
    assert claim is not None
    run = RunDir(home / "runs" / job_id).create()
    outcome = {
        "model": "mine", "version": "1", "classes": ["red", "green", "blue"], "summary": "a head", "warnings": ["few images"],
        "metrics": {"test/top1": 0.9, "cost/wall_seconds": 3.5}, "cross_validation": None, "choices": {"l2": 0.1},
    }  # fmt: skip
    begin_run(run, spec_of("linear_probe", hyperparameters={"batch_size": 16}))
    write_json(run.evaluation, {"splits": {"test": SPLIT}})
    run.report.write_text("<!doctype html><title>report</title>")
    registered(home, home / "bundle", "mine")
    write_json(run.outcome, outcome)
    store.finish(claim, "succeeded", result=outcome)
    return str(job_id)


def test_a_jobs_diagnosis_is_the_document_of_the_command_line(client: TestClient, tmp_path: Path) -> None:
    job_id = finished_job(client, tmp_path)
    path, folder = f"{JOBS}/{job_id}/diagnosis", tmp_path / "runs" / job_id
    records = run_records(neighbours=neighbours(60))
    write_run(folder, replace(records, outcome=None))
    found = client.get(path).json()
    assert [finding["code"] for finding in found["findings"]] == ["leakage"]
    assert found == diagnose(folder).to_dict()
    write_json(RunDir(folder).diagnosis, {**found, "sentence": f"see {tmp_path}/runs/x"})  # a finished run has written its own
    assert client.get(path).json()["sentence"] == found["sentence"]


def test_a_job_that_has_not_begun_to_train_has_no_diagnosis(client: TestClient) -> None:
    file = client.post("/v1/files", files={"file": ("photos.zip", zip_of(photographs()))}, data={"purpose": "fine-tune"}).json()
    job_id = client.post(JOBS, json={"training_file": file["id"]}).json()["id"]
    answer = client.get(f"{JOBS}/{job_id}/diagnosis")
    assert answer.status_code == 409
    assert "nothing to diagnose yet" in answer.json()["detail"]
    assert client.get(f"{JOBS}/ftjob-unknown/diagnosis").status_code == 404


def test_a_jobs_result_has_its_figures_and_its_resolved_hyperparameters(client: TestClient, tmp_path: Path) -> None:
    job_id = finished_job(client, tmp_path)
    job = client.get(f"{JOBS}/{job_id}").json()
    assert job["hyperparameters"]["batch_size"] == 16
    assert job["hyperparameters"]["l2"] == 0.1
    assert job["hyperparameters"]["learning_rate"] is None, "a linear probe has none"
    assert "auto" not in job["hyperparameters"].values()
    assert job["result_files"] == [
        f"{JOBS}/{job_id}/result",
        "/v1/models/mine/versions/1/report",
        "/v1/models/mine/versions/1/bundle",
    ]
    result = client.get(f"{JOBS}/{job_id}/result").json()
    assert (result["model"], result["version"], result["classes"]) == ("mine", "1", ["red", "green", "blue"])
    assert result["splits"] == {"test": SPLIT}
    assert (result["metrics"], result["cost"]) == ({"test/top1": 0.9}, {"wall_seconds": 3.5})
    assert result["hyperparameters"]["weight_decay"] is None
    assert "auto" not in result["hyperparameters"].values()
    for path in job["result_files"]:
        assert client.get(path).status_code == 200, path
    given = {key: job[key] for key in ("training_file", "method", "hyperparameters")}
    answer = client.post(JOBS, json={**given, "suffix": "mine"})
    assert answer.status_code == 201, "what a job shows can be sent again"
    other = answer.json()["id"]
    assert client.get(f"{JOBS}/{other}/result").status_code == 409
    assert client.get(f"{JOBS}/{other}").json()["result_files"] == []


def test_a_run_that_has_not_chosen_its_l2_says_auto(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    begin_run(run, spec_of("linear_probe"))
    assert "l2" not in resolved_hyperparameters(run)
    assert resolved_hyperparameters(RunDir(tmp_path / "none")) == {}


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("full", {}),
        ({"type": "full", "warm_head": False}, {"learning_rate_multiplier": 3.0}),
        ("gradual", {"ema": False, "early_stopping_epochs": None}),
        ({"type": "partial", "stages": 2}, {"learning_rate": 0.002, "learning_rate_multiplier": 0.5, "l2": 1.0}),
        ("linear_probe", {"views": 3}),
    ],
)
def test_a_job_that_is_given_the_resolved_hyperparameters_of_another_does_the_same(
    tmp_path: Path, method: str | dict[str, object], given: dict[str, object]
) -> None:
    run = RunDir(tmp_path / "run")
    resolved = begin_run(run, spec_of(method, hyperparameters=given))
    end_run(run, resolved)  # with L2 10
    found = resolved_hyperparameters(run)
    asked = {name: found[name] for name in Hyperparameters.model_fields}
    assert "auto" not in asked.values()
    for name, value in given.items():
        assert asked[name] == value, name
    assert asked["l2"] == given.get("l2", 10.0)
    if method == "linear_probe":
        assert all(asked[name] is None for name in ("n_epochs", "batch_size", "learning_rate", "weight_decay", "train_size_px"))
        asked = {name: value for name, value in asked.items() if value is not None}
    else:
        asked["train_size_px"] = min(asked["train_size_px"])
    again = resolved_of(spec_of(method, hyperparameters=asked)).recipe
    same = {"sources": {}, "l2": None}
    assert replace(again, **same) == replace(resolved.recipe, **same)


def test_a_version_says_what_it_is_and_how_good(client: TestClient, tmp_path: Path) -> None:
    job_id = finished_job(client, tmp_path)
    found = client.get("/v1/models/mine/versions/champion").json()
    assert (found["id"], found["classes"], found["aliases"]) == ("mine@1", ["red", "green", "blue"], ["champion", "latest"])
    assert found["splits"]["test"]["top1_interval"] == [0.76, 0.97]
    assert found["hyperparameters"]["batch_size"] == 16
    assert found["links"]["job"] == f"{JOBS}/{job_id}"
    assert found["bundle_bytes"] > 0
    by_hand = client.get("/v1/models/colours/versions/1").json()
    assert by_hand["links"] == {
        "report": None,
        "bundle": "/v1/models/colours/versions/1/bundle",
        "card": "/v1/models/colours/versions/1/card",
        "job": None,
        "predictions": None,
    }
    assert client.get("/v1/models/colours/versions/1/report").status_code == 404
    assert client.get("/v1/models/colours/versions/9").status_code == 404


def test_a_report_is_shown_with_its_styles_and_without_scripts(client: TestClient, tmp_path: Path) -> None:
    finished_job(client, tmp_path)
    report = client.get("/v1/models/mine/versions/1/report")
    assert report.headers["content-type"].startswith("text/html")
    policy = report.headers["content-security-policy"]
    assert "style-src 'unsafe-inline'" in policy
    assert "sandbox" in policy
    assert "script-src" not in policy


def test_a_downloaded_bundle_is_the_bundle(client: TestClient, tmp_path: Path) -> None:
    answer = client.get("/v1/models/colours/versions/1/bundle")
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert 'filename="colours-1.tar"' in answer.headers["content-disposition"]
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "downloaded", filter="data")
    assert sorted(names) == [f"colours-1/{name}" for name in ("bundle.json", "model.onnx", "probe.npz")]
    assert Predictor.load(tmp_path / "downloaded" / "colours-1").predict(picture("red")).labels[0][0] == "red"


# --- documentation --------------------------------------------------------------------------------


def test_the_documentation_describes_every_route_and_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs")
    document = client.get("/docs.json").json()
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    for path, item in document["paths"].items():
        assert f"<code>{path}</code>" in page.text, path
        for operation in item.values():
            assert f'id="{operation["operationId"]}"' in page.text
    for name in document["components"]["schemas"]:
        assert f'id="schema-{name}"' in page.text
    assert not re.search(r"<script|style=| on\w+=|https?://(?!127\.0\.0\.1)[^<\"']*\.(?:js|css)", page.text)
    links = set(re.findall(r'href="#([^"]+)"', page.text))
    anchors = set(re.findall(r'id="([^"]+)"', page.text))
    assert len(links) > 40
    assert links <= anchors
    assert client.get("/static/docs.css").status_code == 200


def test_operations_have_names_of_their_own(client: TestClient) -> None:
    document = client.get("/docs.json").json()
    names = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(set(names)) == len(names)
    assert {"create_job", "list_jobs", "predict_with_default_model"} <= set(names)
    arrays = [text for text in re.findall(r'\{[^{}]*"type": "array"[^{}]*\}', json.dumps(document)) if '"items"' not in text]
    assert [text for text in arrays if '"prefixItems"' not in text] == []


# --- the client -----------------------------------------------------------------------------------


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Client]:
    registered(tmp_path, write_bundle(tmp_path / "bundle"))
    with live_server(tmp_path) as server, finetune.Client(server.url) as ours:
        assert isinstance(ours, Client)
        yield ours


def test_our_client_predicts(ours: Client, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(picture("red"))
    for image in (tmp_path / "red.png", str(tmp_path / "red.png"), picture("red"), io.BytesIO(picture("red"))):
        assert ours.predict(image, top_k=1)["predictions"][0]["label"] == "red"
    assert len(ours.predict(picture(), embedding=True, model="colours@1")["embedding"]) == 3
    several = ours.predict_many([picture("blue"), b"broken"], model="colours")
    assert several["data"][0]["result"]["predictions"][0]["label"] == "blue"
    assert several["data"][1]["error"]["code"] == "unsupported_image"
    with pytest.raises(RequestRefused, match="unsupported_image"):
        ours.predict(b"broken")


def test_our_client_fine_tunes_and_reads_results(ours: Client, tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(zip_of(photographs()))
    file_id = ours.upload(tmp_path / "photos.zip")
    job = ours.create_job(file_id, suffix="mine", metadata={"team": "a"}, idempotency_key="k")
    assert ours.create_job(file_id, suffix="mine", metadata={"team": "a"}, idempotency_key="k")["id"] == job["id"]
    assert [one["id"] for one in ours.jobs(metadata={"team": "a"})] == [job["id"]]
    assert list(ours.jobs(status="running")) == []
    assert ours.cancel(job["id"])["status"] == "cancelled"
    assert [event["kind"] for event in ours.events(job["id"])] == ["queued", "cancelled"]
    with pytest.raises(JobFailed, match="cancelled"):
        ours.wait(job["id"])
    ours.delete_job(job["id"])
    finished = finished_job(ours._connection.http, tmp_path)
    assert ours.wait(finished)["status"] == "succeeded"
    assert ours.result(finished)["splits"]["test"]["n"] == 40


def test_our_client_manages_models(ours: Client, tmp_path: Path) -> None:
    registered(tmp_path, tmp_path / "bundle")
    assert [model["id"] for model in ours.models()] == ["colours"]
    assert ours.version("colours", "2")["aliases"] == ["latest"]
    ours.promote("colours", "2")
    assert ours.predict(picture())["version"] == "2"
    assert ours.deploy("colours@1")["version"] == "1"
    folder = ours.download_bundle("colours", "2", tmp_path / "downloaded")
    assert Predictor.load(folder).predict(picture("green")).labels[0][0] == "green"
    with pytest.raises(Conflict, match="exists already"):
        ours.download_bundle("colours", "2", folder)
    with pytest.raises(RequestRefused, match="not_found"):
        ours.download_bundle("colours", "9", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_run_of_a_version_is_found_while_others_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (version,) = registered(tmp_path, write_bundle(tmp_path / "bundle")).list()
    for name in ("a", "b", "c"):
        model = "colours" if name == "b" else "another"
        write_json(RunDir(tmp_path / "runs" / name).create().outcome, {"model": model, "version": "1"})

    def meanwhile(path: Path) -> int | None:
        shutil.rmtree(tmp_path / "runs" / "a", ignore_errors=True)
        return modified_ns(path)

    monkeypatch.setattr("service.results.modified_ns", meanwhile)
    found = run_of(tmp_path / "runs", version)
    assert found is not None
    assert found.name == "b"
