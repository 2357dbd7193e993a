"""Examinations over HTTP: an upload is examined in the queue of the jobs; the findings are JSON and a page with pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from archives import photographs, zip_of
from serving import in_process, live_server, until
from starlette.testclient import TestClient

from finetune.client import Client
from finetune.doctor.finding import Case, Examination, Finding
from finetune.jobs.database import open_jobs
from finetune.jobs.keys import KeyStore
from finetune.jobs.kinds import CHECK
from finetune.jobs.store import JobStore
from finetune.storage.files import write_json
from finetune.storage.rundir import RunDir

pytestmark = pytest.mark.usefixtures("uploads_read_here")

FOUND = Examination(
    revision="a" * 64,
    n_images=6,
    classes=("daisy", "rose"),
    findings=(
        Finding("duplicates", "note", "Files with the same bytes", 1, "1 file more.", "Leave one.", (Case(("a", "b"), key="k"),)),
        Finding("small_classes", "doubt", "Few", 2, "Two.", "Add.", (Case((), key="daisy"), Case((), key="rose"))),
    ),
    backbone="tiny",
)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with in_process(tmp_path, wait=False) as client:
        yield client


def upload(client: TestClient, **headers: str) -> str:
    archive = ("flowers.zip", zip_of(photographs()))
    answer = client.post("/v1/files", files={"file": archive}, data={"purpose": "fine-tune"}, headers=headers)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def finished(home: Path, check_id: str) -> None:
    """Do what a worker would."""
    store = JobStore(open_jobs(home))
    claim = store.claim("worker")
    assert claim is not None
    run = RunDir(home / "runs" / check_id).create()
    write_json(run.examination, FOUND.to_dict(200))
    run.report.write_text(f"<p>of {home}/files</p>")
    result = {"summary": "Found in 6 images: 1 note.", "revision": FOUND.revision}
    write_json(run.root / CHECK.result, result)
    store.finish(claim, "succeeded", message=CHECK.conclude(result), result=result)


@pytest.mark.usefixtures("known_backbones")
def test_an_upload_is_queued_to_be_examined_with_or_without_a_body(client: TestClient, tmp_path: Path) -> None:
    file_id = upload(client)
    answer = client.post(f"/v1/files/{file_id}/check")
    made = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (201, f"/v1/checks/{made['id']}")
    assert {
        "object": "data_check", "status": "queued", "file": file_id, "conclusion": None, "error": None, "result_files": [],
        "description": "data examined with tf_efficientnet_lite0",
    }.items() <= made.items()  # fmt: skip
    body = {"data": {"resize": "squash"}, "model": "test_resnet", "metadata": {"by": "ann"}}
    other = client.post(f"/v1/files/{file_id}/check", json=body).json()
    assert (other["description"], other["metadata"]) == ("data examined with test_resnet", {"by": "ann"})
    stored = JobStore(open_jobs(tmp_path)).get(other["id"])
    assert (stored.kind, stored.suffix, stored.spec["data"]["resize"]) == (CHECK, None, "squash")
    assert stored.spec["training_file"] == str(tmp_path / "files" / file_id)
    assert {one["id"] for one in client.get("/v1/checks").json()["data"]} == {made["id"], other["id"]}
    repeated = [client.post(f"/v1/files/{file_id}/check", headers={"Idempotency-Key": "once"}).json()["id"] for _ in range(2)]
    assert repeated[0] == repeated[1]


@pytest.mark.usefixtures("known_backbones")
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"method": "full"}, "method"),
        ({"training_file": "x"}, "training_file"),
        ({"data": {"resise": "crop"}}, "data.resise"),
        ({"model": "no_such_net"}, "model"),
        ({"validation_file": "/etc"}, "validation_file"),
    ],
)
def test_a_wrong_field_is_named(client: TestClient, body: dict[str, Any], field: str) -> None:
    answer = client.post(f"/v1/files/{upload(client)}/check", json=body)
    assert answer.status_code == 422, answer.text
    assert any(one["field"].startswith(field) for one in answer.json()["errors"]), answer.text


def test_what_was_found_is_json_and_a_page(client: TestClient, tmp_path: Path) -> None:
    check_id = client.post(f"/v1/files/{upload(client)}/check").json()["id"]
    for path in ("result", "report"):
        assert client.get(f"/v1/checks/{check_id}/{path}").status_code == 409
    finished(tmp_path, check_id)
    done = client.get(f"/v1/checks/{check_id}").json()
    assert (done["status"], done["conclusion"]) == ("succeeded", "Found in 6 images: 1 note.")
    result, report = (client.get(path) for path in done["result_files"])
    assert (result.json()["id"], result.json()["n_images"]) == (check_id, 6)
    assert [(one["kind"], one["cases"][0]["ids"]) for one in result.json()["findings"]] == [
        ("duplicates", ["a", "b"]),
        ("small_classes", []),
    ]
    assert report.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in report.headers["content-security-policy"]
    assert str(tmp_path) not in report.text
    assert client.delete(f"/v1/checks/{check_id}").json()["object"] == "data_check"
    assert client.get(f"/v1/checks/{check_id}/result").status_code == 404


def test_what_was_looked_at_and_accepted_is_not_shown_again_until_it_is_withdrawn(client: TestClient, tmp_path: Path) -> None:
    def checked() -> str:
        check_id = str(client.post(f"/v1/files/{upload(client)}/check").json()["id"])
        finished(tmp_path, check_id)
        return check_id

    def left(check_id: str) -> dict[str, tuple[int, int]]:
        found = client.get(f"/v1/checks/{check_id}/result").json()["findings"]
        return {one["kind"]: (one["count"], one["acknowledged"]) for one in found}

    def say(check_id: str, **asked: Any) -> int:
        answer = client.post(f"/v1/checks/{check_id}/acknowledgements", json=asked)
        assert answer.status_code != 200 or answer.json() == client.get(f"/v1/checks/{check_id}/result").json()
        return answer.status_code

    first = checked()
    assert say(first, kind="duplicates") == 200
    assert say(first, kind="small_classes", keys=["rose"]) == 200
    assert left(first) == {"duplicates": (0, 1), "small_classes": (1, 1)}
    second = checked()  # another upload: the images are the same, its classes are another matter
    assert left(second) == {"duplicates": (0, 1), "small_classes": (2, 0)}
    assert say(first, kind="duplicates", acknowledged=False) == 200
    assert left(first)["duplicates"] == left(second)["duplicates"] == (1, 0)
    assert say(first, kind="leaks") == 404
    assert say(first, kind="duplicates", keys=["nothing"]) == 422
    keys = KeyStore(open_jobs(tmp_path))
    bob = {"Authorization": f"Bearer {keys.create('bob', ['jobs'])[0]}"}
    until(lambda: client.get("/v1/checks").status_code == 401)  # from now on a key is needed
    assert client.post(f"/v1/checks/{first}/acknowledgements", json={"kind": "duplicates"}, headers=bob).status_code == 404


def test_nobody_else_s_upload_is_examined_and_no_check_of_another_is_seen(client: TestClient, tmp_path: Path) -> None:
    keys = KeyStore(open_jobs(tmp_path))
    ann, bob = ({"Authorization": f"Bearer {keys.create(who, ['jobs', 'predict'])[0]}"} for who in ("ann", "bob"))
    file_id = upload(client, **ann)
    assert client.post(f"/v1/files/{file_id}/check", headers=bob).status_code == 404
    made = client.post(f"/v1/files/{file_id}/check", headers=ann)
    assert made.status_code == 201, made.text
    for path in ("", "/events", "/logs", "/result", "/report"):
        assert client.get(f"/v1/checks/{made.json()['id']}{path}", headers=bob).status_code == 404
    assert client.get("/v1/checks", headers=bob).json()["data"] == []


@pytest.mark.longer
def test_a_worker_examines_an_upload_as_the_command_does(tmp_path: Path) -> None:
    data = tmp_path / "flowers"
    for name, picture in photographs({"daisy": 6, "rose": 6}).items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(picture)
    (data / "daisy" / "again.png").write_bytes((data / "daisy" / "0.png").read_bytes())
    (data / "rose" / "broken.png").write_bytes(b"nothing")
    with live_server(tmp_path, worker=True, ready=False) as server, Client(server.url) as client:
        asked = {"backbone": "test_efficientnet", "weights": "none", "input_size_px": 64}
        made = client.check_file(client.upload(data), model=asked, data={"max_bad_fraction": 0.5})
        done = client.wait(made["id"], poll_seconds=0.1)
        assert done["conclusion"].startswith("Found in 13 images: 1 problem")
        kinds = {one["kind"]: one for one in client.result(made["id"])["findings"]}
        assert {"unreadable", "duplicates", "small_classes"} <= set(kinds)
        assert "data:image/jpeg" in client.report(made["id"])
        wrong = client.check_file(client.upload(data), model=asked, data={"max_bad_fraction": 0.0})
        client_side = client.job(wrong["id"])
        assert client_side["object"] == "data_check"
