"""Batch predictions over HTTP: images go up, wait in the queue of the jobs, and come back as a table."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from archives import photographs, tar_of, zip_of
from click.testing import CliRunner
from folders import write_classes
from serving import in_process, live_server, registered, until
from standin import picture, write_bundle
from starlette.testclient import TestClient

from finetune.bundle.access import Access
from finetune.bundle.registry import Registry
from finetune.cli import cli
from finetune.client import Client
from finetune.evaluation import predictions as tables
from finetune.jobs.database import open_jobs
from finetune.jobs.keys import KeyStore
from finetune.jobs.kinds import BATCH
from finetune.jobs.store import JobStore
from finetune.storage.files import write_json
from finetune.storage.rundir import RunDir

pytestmark = pytest.mark.usefixtures("uploads_read_here")

BATCHES = "/v1/batch_predictions"
IMAGES = {"a.png": picture("red"), "deep/er/b.png": picture("green"), "c.jpg": picture("blue", file_format="JPEG")}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    registered(tmp_path, write_bundle(tmp_path / "bundle"))
    with in_process(tmp_path, data_roots=(tmp_path / "data",)) as client:
        yield client


def upload(client: TestClient | httpx.Client, members: dict[str, bytes] | None = None, **headers: str) -> str:
    archive = ("holiday.zip", zip_of(IMAGES if members is None else members))
    answer = client.post("/v1/files", files={"file": archive}, data={"purpose": "batch"}, headers=headers)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def problems(answer: Any) -> dict[str, str]:
    assert answer.status_code == 422, answer.text
    return {one["field"]: one["detail"] for one in answer.json()["errors"]}


# --- uploads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["coverage", "abstain", "top_k"])
def test_an_option_of_a_single_prediction_is_refused_with_what_is_allowed(client: TestClient, option: str) -> None:
    found = problems(client.post(BATCHES, json={"input_file": upload(client), option: 0.9}))
    allowed = "unknown key; allowed are input_file, model, embedding, metadata. The answers contain the probabilities"
    assert found[option].startswith(allowed)


def test_an_upload_to_be_answered_needs_no_class_folders_but_an_image(client: TestClient) -> None:
    file_id = upload(client)
    file = client.get(f"/v1/files/{file_id}").json()
    assert (file["purpose"], file["summary"]["classes"], file["summary"]["counts"]) == ("batch", [], {"all": {"": 3}})
    assert client.get("/v1/files?purpose=batch").json()["data"] == [file]
    assert client.get("/v1/files?purpose=fine-tune").json()["data"] == []
    for members, purpose, said in (
        ({"notes.txt": b"no image"}, "batch", "no image file"),
        (IMAGES, "fine-tune", "class"),
        (IMAGES, "batches", "or 'batch' for images to be answered"),
    ):
        refused = client.post("/v1/files", files={"file": ("x.zip", zip_of(members))}, data={"purpose": purpose})
        assert refused.status_code in (400, 422), refused.text
        assert said in refused.text
    escaping = tar_of({"a.png": picture(), "../../outside.png": picture()})
    refused = client.post("/v1/files", files={"file": ("x.tar", escaping)}, data={"purpose": "batch"})
    assert refused.status_code == 422, "the limits of archives hold here too"


def test_a_model_that_a_queued_batch_needs_is_not_deleted(client: TestClient, tmp_path: Path) -> None:
    registered(tmp_path, tmp_path / "bundle", "hats")
    registry = registered(tmp_path, tmp_path / "bundle", "hats")
    registry.set_alias("hats", "champion", "2")
    made = client.post(BATCHES, json={"input_file": upload(client), "model": "hats@1"}).json()
    for reference in ("hats@1", "hats"):
        refused = client.delete(f"/v1/models/{reference}")
        assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
        assert f"{reference} is needed by the batch prediction {made['id']}" in refused.json()["detail"]
    assert client.post(f"{BATCHES}/{made['id']}/cancel").status_code == 200
    assert client.delete("/v1/models/hats@1").status_code == 200


# --- creating -------------------------------------------------------------------------------------


def test_what_answers_is_decided_when_the_request_is_made(client: TestClient, tmp_path: Path) -> None:
    file_id, registry = upload(client), Registry(tmp_path / "models")
    body = {"input_file": file_id, "embedding": True, "metadata": {"trip": "sea"}}
    answer = client.post(BATCHES, json=body)
    made = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (201, f"{BATCHES}/{made['id']}")
    expected = {
        "object": "batch_prediction", "status": "queued", "queue_position": 0, "input_file": file_id, "model": "colours@1",
        "embedding": True, "metadata": {"trip": "sea"}, "description": "images predicted by colours@1", "conclusion": None,
        "error": None, "result_files": [], "organization_id": "local",
    }  # fmt: skip
    assert expected.items() <= made.items()
    assert made["id"].startswith("batch-")
    registry.register(tmp_path / "bundle", "colours")
    registry.set_alias("colours", "champion", "2")
    assert client.get(f"{BATCHES}/{made['id']}").json()["model"] == "colours@1"
    for reference in ("colours", "colours@champion", "colours@2"):
        asked = {"input_file": file_id, "model": reference, "embedding": None, "metadata": None}
        assert client.post(BATCHES, json=asked).json()["model"] == "colours@2"
    stored = JobStore(open_jobs(tmp_path)).get(made["id"])
    assert (stored.kind, stored.suffix, stored.request) == (BATCH, None, body)
    assert stored.spec["input_file"] == str(tmp_path / "files" / file_id)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input_file"),
        ({"input_file": 3}, "input_file"),
        ({"input_file": "file-none"}, "input_file"),
        ({"input_file": "/etc"}, "input_file"),
        ({"input_file": "data/../../etc"}, "input_file"),
        ({"model": "nothing"}, "model"),
        ({"model": "colours@9"}, "model"),
        ({"model": "../../etc"}, "model"),
        ({"model": ""}, "model"),
        ({"model": ["colours"]}, "model"),
        ({"embedding": "yes please"}, "embedding"),
        ({"embedding": "true"}, "embedding"),
        ({"metadata": {"a": "x" * 600}}, "metadata.a"),
        ({"top_k": 3}, "top_k"),
    ],
)
def test_a_wrong_field_is_named(body: dict[str, Any], field: str, client: TestClient) -> None:
    valid = {"input_file": upload(client)} if "input_file" not in body and body else {}
    assert field in problems(client.post(BATCHES, json={**valid, **body}))
    assert client.get(BATCHES).json()["data"] == []


def test_several_problems_are_told_at_once(client: TestClient) -> None:
    found = problems(client.post(BATCHES, json={"input_file": "file-none", "model": 3, "colour": 1}))
    assert set(found) == {"input_file", "model", "colour"}


def test_the_same_key_and_body_give_the_same_batch(client: TestClient) -> None:
    body, key = {"input_file": upload(client)}, {"Idempotency-Key": "once"}
    first, again = (client.post(BATCHES, json=body, headers=key) for _ in range(2))
    assert (again.json(), again.headers["idempotent-replayed"]) == (first.json(), "true")
    assert client.post(BATCHES, json={**body, "embedding": True}, headers=key).status_code == 422
    assert len(client.get(BATCHES).json()["data"]) == 1


def test_a_server_without_a_default_wants_a_model_to_be_named(tmp_path: Path) -> None:
    with in_process(tmp_path, wait=False) as client:
        found = problems(client.post(BATCHES, json={"input_file": upload(client)}))
    assert "no default model" in found["model"]


def test_a_folder_of_the_server_and_a_dataset_to_train_on_are_answered_too(client: TestClient, tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "data" / "birds", {"owl": 2})
    assert client.post(BATCHES, json={"input_file": str(folder)}).status_code == 201
    archive = {"file": ("flowers.zip", zip_of(photographs()))}
    file_id = client.post("/v1/files", files=archive, data={"purpose": "fine-tune"}).json()["id"]
    assert client.post(BATCHES, json={"input_file": file_id}).status_code == 201
    assert client.delete(f"/v1/files/{file_id}").status_code == 409, "it is still to be read"


# --- answers --------------------------------------------------------------------------------------


def test_another_owners_batches_files_and_private_models_do_not_exist(client: TestClient, tmp_path: Path) -> None:
    keys = KeyStore(open_jobs(tmp_path))
    ann, bob = ({"Authorization": f"Bearer {keys.create(who, ['jobs', 'predict'])[0]}"} for who in ("ann", "bob"))
    registry = Registry(tmp_path / "models")
    registry.reserve("secret", Access("ann", "private"))
    registry.register(tmp_path / "bundle", "secret")
    until(lambda: "secret" in client.get("/v1/models", headers=ann).text)
    hers, his = upload(client, **ann), upload(client, **bob)
    made = client.post(BATCHES, json={"input_file": hers, "model": "secret"}, headers=ann)
    assert made.status_code == 201, made.text
    found = problems(client.post(BATCHES, json={"input_file": hers, "model": "secret"}, headers=bob))
    assert set(found) == {"input_file", "model"}
    assert "secret" in problems(client.post(BATCHES, json={"input_file": his, "model": "secret"}, headers=bob))["model"]
    for path in ("", "/events", "/logs", "/result", "/answers"):
        assert client.get(f"{BATCHES}/{made.json()['id']}{path}", headers=bob).status_code == 404
    assert client.get(BATCHES, headers=bob).json()["data"] == []
    assert client.get(f"{BATCHES}/{made.json()['id']}/answers", headers=ann).status_code == 409, "not finished"


def test_answers_that_are_gone_or_were_never_written_are_not_found(client: TestClient, tmp_path: Path) -> None:
    batch_id = client.post(BATCHES, json={"input_file": upload(client)}).json()["id"]
    store = JobStore(open_jobs(tmp_path))
    claim = store.claim("worker")
    assert claim is not None
    run = RunDir(tmp_path / "runs" / batch_id).create()
    result = {
        "object": "batch_prediction", "id": batch_id, "model": "colours", "version": "1", "classes": ["red"], "n_answered": 1,
        "n_unreadable": 0, "unreadable": [], "files": ["answers.csv", "answers.npz"], "summary": "1 image answered",
    }  # fmt: skip
    write_json(run.root / "batch.json", result)
    (run.root / "answers.csv").write_text("file\na.png\n")
    store.finish(claim, "succeeded", message=BATCH.conclude(result), result=result)
    answer = client.get(f"{BATCHES}/{batch_id}/answers")
    assert (answer.text, answer.headers["content-type"]) == ("file\na.png\n", "text/csv; charset=utf-8")
    assert f'filename="{batch_id}.csv"' in answer.headers["content-disposition"]
    assert "it has csv, npz" in client.get(f"{BATCHES}/{batch_id}/answers?format=parquet").json()["detail"]
    assert client.get(f"{BATCHES}/{batch_id}/answers?format=npz").status_code == 404
    assert client.get(f"{BATCHES}/{batch_id}/answers?format=xml").status_code == 422
    assert client.delete(f"{BATCHES}/{batch_id}").json()["object"] == "batch_prediction"
    assert not run.root.exists()


@pytest.mark.longer
def test_a_worker_answers_every_image_as_predict_does(tmp_path: Path) -> None:
    """The real server and worker, through our client."""
    registered(tmp_path, write_bundle(tmp_path / "bundle"))
    folder = tmp_path / "holiday"
    for name, data in {**IMAGES, "broken.png": b"no image"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    with live_server(tmp_path, worker=True) as server, Client(server.url) as client:
        batch_id = client.create_batch(client.upload(folder, purpose="batch"), embedding=True)["id"]
        done = client.wait(batch_id, poll_seconds=0.1)
        assert (done["status"], done["conclusion"]) == ("succeeded", "3 images predicted by colours@1, 1 could not be read.")
        result = client.result(batch_id)
        assert (result["n_answered"], result["n_unreadable"], result["unreadable"][0]["file"]) == (3, 1, "broken.png")
        rows = list(csv.DictReader(io.StringIO(client.download_answers(batch_id, tmp_path / "answers.csv").read_text())))
        assert [row["file"] for row in rows] == ["a.png", "c.jpg", "deep/er/b.png"]
        for row in rows:
            answered = client.predict(folder / row["file"])["predictions"][0]
            assert (row["predicted"], float(row["probability"])) == (
                answered["label"], pytest.approx(answered["probability"], abs=1e-6),
            )  # fmt: skip
        table = tables.read(client.download_answers(batch_id, tmp_path / "answers.npz"))
        assert table.ids == tuple(row["file"] for row in rows)
        assert table.embedding is not None
        assert np.isfinite(table.embedding).all()
        assert [one["id"] for one in client.batches(status="succeeded")] == [batch_id]
        assert not list((tmp_path / "runs" / batch_id).glob("parts*"))


@pytest.mark.longer
def test_the_command_asks_a_server_and_writes_what_it_answers(tmp_path: Path) -> None:
    registered(tmp_path, write_bundle(tmp_path / "bundle"))
    folder, out = tmp_path / "holiday", tmp_path / "answers.csv"
    folder.mkdir()
    for name in ("a.png", "c.jpg"):
        (folder / name).write_bytes(IMAGES[name])
    with live_server(tmp_path, worker=True) as server:
        asked = ("predict", str(folder), "--server", server.url, "--out", str(out))
        ran = command_line(*asked, "--model", "colours@1")
        assert ran.returncode == 0, ran.stderr
        assert "2 images predicted by colours@1; the predictions are in" in ran.stderr.replace("\n", "")
        with open(out, newline="") as stream:
            assert [row["predicted"] for row in csv.DictReader(stream)] == ["red", "blue"]
        (folder / "broken.png").write_bytes(b"broken")
        as_json = command_line(*asked, "--json")
        assert (as_json.returncode, json.loads(as_json.stdout)["n_unreadable"]) == (2, 1)
        listed = json.loads(command_line("jobs", "list", "--server", server.url, "--json").stdout)["jobs"]
        assert {(job["kind"], job["state"]) for job in listed} == {("batch", "succeeded")}


@pytest.mark.parametrize("arguments", [[], ["--out", "a.csv", "--explain", "maps"], ["b.png", "--out", "a.csv"]])
def test_the_command_says_what_it_needs_to_ask_a_server(arguments: list[str]) -> None:
    refused = CliRunner().invoke(cli, ["predict", "a", "--server", "http://127.0.0.1:1", *arguments])
    assert (refused.exit_code, "--server" in refused.output) == (2, True)


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-m", "finetune", *arguments], env=variables, capture_output=True, text=True, check=False
    )
