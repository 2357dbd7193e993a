"""Datasets over HTTP: uploaded, described, listed, refused, deleted."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from archives import bad, good, photographs, zip_of
from serving import in_process, registered
from standin import write_bundle
from starlette.testclient import TestClient

from finetune.data.contents import read_members
from finetune.jobs.database import open_jobs
from finetune.jobs.files import FileStore
from finetune.jobs.store import JobStore
from service import uploads
from service.limits import MULTIPART_OVERHEAD_BYTES

GOOD, BAD = good(), bad()
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with in_process(tmp_path, wait=False) as client:
        yield client


def upload(client: TestClient, data: bytes, name: str = "flowers.zip", **headers: str) -> object:
    return client.post("/v1/files", files={"file": (name, data)}, data={"purpose": "fine-tune"}, headers=headers)


def left_in(home: Path) -> list[str]:
    folder = home / "files"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("kind", GOOD)
def test_every_good_archive_is_taken_and_described(kind: str, client: TestClient, tmp_path: Path) -> None:
    answer = upload(client, GOOD[kind], "Flowers of May.archive")
    assert answer.status_code == 201
    file = answer.json()
    assert (file["object"], file["purpose"], file["status"]) == ("file", "fine-tune", "processed")
    assert (file["filename"], file["bytes"]) == ("Flowers of May.archive", len(GOOD[kind]))
    assert file["summary"]["counts"] == {"all": {"daisy": 3, "rose": 3}}
    assert answer.headers["location"] == f"/v1/files/{file['id']}"
    assert client.get(f"/v1/files/{file['id']}").json() == file
    contents = tmp_path / "files" / file["id"]
    assert {one.name.decode().removeprefix("./") for one in read_members(contents) if one.sha256} == set(photographs())
    assert left_in(tmp_path) == [file["id"]]


@pytest.mark.longer
def test_every_bad_archive_is_refused_in_one_sentence_and_leaves_nothing(client: TestClient, tmp_path: Path) -> None:
    for what, (data, _) in BAD.items():
        answer = upload(client, data)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_archive"), what
        assert str(tmp_path) not in answer.text
    assert left_in(tmp_path) == []
    assert client.get("/v1/files").json()["data"] == []


def test_the_refused_member_is_named(client: TestClient) -> None:
    assert "'../escaped.png' points out of the archive" in upload(client, BAD["tar: parent"][0]).json()["detail"]


def test_a_dataset_without_classes_is_refused_with_the_right_layout(client: TestClient, tmp_path: Path) -> None:
    answer = upload(client, zip_of({"1.png": photographs()["daisy/0.png"]}))
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_data")
    assert "one folder per class" in answer.json()["detail"]
    assert str(tmp_path) not in answer.text
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("form", "status", "field"),
    [
        ({"files": {"file": ("a.zip", GOOD["zip"])}}, 422, "purpose"),
        ({"files": {"file": ("a.zip", GOOD["zip"])}, "data": {"purpose": "vision"}}, 422, "purpose"),
        ({"files": {"file": ("a.zip", GOOD["zip"])}, "data": {"purpose": "fine-tune", "extra": "1"}}, 422, "extra"),
        ({"files": {"other": ("a.zip", GOOD["zip"])}, "data": {"purpose": "fine-tune"}}, 422, "other"),
        ({"files": {"x": ("", b"")}, "data": {"purpose": "fine-tune", "file": "http://127.0.0.1:1/a.zip"}}, 422, "file"),
        ({"files": {"file": ("a.zip", b"")}, "data": {"purpose": "fine-tune"}}, 422, "file"),
        ({"files": [("file", ("a", b"1")), ("file", ("b", b"2"))], "data": {"purpose": "fine-tune"}}, 400, None),
        ({"json": {"purpose": "fine-tune"}}, 415, None),
        ({"content": b"--x\r\nbroken", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 422, "file"),
        ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, 400, None),
    ],
)
def test_what_is_not_an_upload_is_refused(
    form: dict[str, object], status: int, field: str | None, client: TestClient, tmp_path: Path
) -> None:
    answer = client.post("/v1/files", **form)  # type: ignore[arg-type]
    assert answer.status_code == status, answer.text
    if field is not None:
        assert field in [problem["field"] for problem in answer.json()["errors"]]
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_that_is_too_large_is_cut_off(chunked: bool, tmp_path: Path) -> None:
    with in_process(tmp_path, wait=False, max_upload_bytes=10_000) as client:
        boundary = "x"
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\n'
        body = head + bytes(10_000 + MULTIPART_OVERHEAD_BYTES)
        content = (body[start : start + 4096] for start in range(0, len(body), 4096)) if chunked else body
        headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
        answer = client.post("/v1/files", content=content, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (413, "request_too_large")
        assert left_in(tmp_path) == []


def test_a_name_is_shown_and_never_a_path(client: TestClient, tmp_path: Path) -> None:
    file = upload(client, GOOD["zip"], "../../..\\evil\x1b[31m\u202e.zip").json()
    assert file["filename"] == "evil[31m.zip"
    assert left_in(tmp_path) == [file["id"]]


def test_a_full_disk_is_told_before_anything_is_written(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 10, 0))
    answer = upload(client, GOOD["zip"])
    assert (answer.status_code, answer.json()["code"]) == (503, "disk_full")
    assert left_in(tmp_path) == []


def test_the_same_key_and_file_give_the_same_upload_and_another_file_is_refused(client: TestClient, tmp_path: Path) -> None:
    first = upload(client, GOOD["zip"], **{"Idempotency-Key": "k1"})
    again = upload(client, GOOD["zip"], **{"Idempotency-Key": "k1"})
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    other = upload(client, GOOD["tar"], **{"Idempotency-Key": "k1"})
    assert (other.status_code, other.json()["code"]) == (422, "invalid_input")
    assert left_in(tmp_path) == [first.json()["id"]]


def test_uploads_beyond_the_quota_are_refused_with_what_is_used_and_allowed(tmp_path: Path) -> None:
    with in_process(tmp_path / "other", wait=False) as client:
        size = upload(client, GOOD["zip"]).json()["stored_bytes"]
    with in_process(tmp_path, wait=False, max_files_bytes=2 * size + 100) as client:
        first = upload(client, GOOD["zip"], **{"Idempotency-Key": "k1"}).json()
        assert upload(client, GOOD["zip"]).status_code == 201
        refused = upload(client, GOOD["zip"])
        assert (refused.status_code, refused.json()["code"]) == (413, "files_full")
        assert f"{2 * size:,}, and {2 * size + 100:,} are allowed in all" in refused.json()["detail"]
        assert upload(client, GOOD["zip"], **{"Idempotency-Key": "k1"}).json() == first, "a repetition adds nothing"
        client.delete(f"/v1/files/{first['id']}")
        assert upload(client, GOOD["zip"], **{"Idempotency-Key": "k2"}).status_code == 201
        assert len(left_in(tmp_path)) == 2


def test_pages_turn_with_after_and_limit_newest_first(client: TestClient) -> None:
    made = [upload(client, GOOD["zip"], f"{number}.zip").json()["id"] for number in range(3)]
    first = client.get("/v1/files?limit=2").json()
    assert ([one["id"] for one in first["data"]], first["has_more"]) == ([made[2], made[1]], True)
    second = client.get(f"/v1/files?limit=2&after={first['last_id']}").json()
    assert ([one["id"] for one in second["data"]], second["has_more"]) == ([made[0]], False)


def test_a_deleted_file_is_gone_with_its_contents(client: TestClient, tmp_path: Path) -> None:
    file_id = upload(client, GOOD["zip"]).json()["id"]
    assert client.delete(f"/v1/files/{file_id}").json() == {"id": file_id, "object": "file", "deleted": True}
    assert left_in(tmp_path) == []
    for method in ("GET", "DELETE"):
        answer = client.request(method, f"/v1/files/{file_id}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_a_file_that_a_job_waits_for_cannot_be_deleted(client: TestClient, tmp_path: Path) -> None:
    file_id = upload(client, GOOD["zip"]).json()["id"]
    job = client.post("/v1/fine_tuning/jobs", json={"training_file": file_id}).json()
    answer = client.delete(f"/v1/files/{file_id}")
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    assert client.delete(f"/v1/files/{file_id}").status_code == 200


def test_what_is_uploaded_is_readable_by_the_server_alone(client: TestClient, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        place = tmp_path / "files" / upload(client, GOOD["zip"]).json()["id"]
    finally:
        os.umask(before)
    stored = [path for path in place.rglob("*") if path.is_file()]
    assert len(stored) > 1
    assert {path.stat().st_mode & 0o777 for path in stored} == {0o600}
    assert place.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("path", ["/v1/fine_tuning/jobs", "/v1/files/{id}/check", "/v1/batch_predictions"])
def test_no_job_is_queued_for_a_file_that_is_deleted_while_its_request_is_checked(
    path: str, client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(tmp_path, write_bundle(tmp_path / "bundle"))
    file_id = upload(client, GOOD["zip"]).json()["id"]
    create = JobStore.create

    def deleted_first(store: JobStore, *given: Any, **named: Any) -> Any:
        FileStore(store.engine).delete(file_id)
        return create(store, *given, **named)

    monkeypatch.setattr(JobStore, "create", deleted_first)
    body = {
        "/v1/fine_tuning/jobs": {"training_file": file_id},
        "/v1/batch_predictions": {"input_file": file_id, "model": "colours"},
    }
    answer = client.post(path.format(id=file_id), json=body.get(path, {}))
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), answer.text
    assert f"{file_id} was deleted" in answer.json()["detail"]
    assert JobStore(open_jobs(tmp_path)).newest(10) == []


def test_what_a_killed_server_left_is_swept_at_the_next_start_and_what_is_arriving_is_not(tmp_path: Path) -> None:
    dead, alive = tmp_path / "files" / ".arriving-dead", tmp_path / "files" / ".arriving-alive"
    for folder in (dead, alive):
        folder.mkdir(parents=True)
        (folder / "archive").write_bytes(b"x")
        (folder / ".lock").touch()
    orphan, fresh = tmp_path / "files" / "file-orphan", tmp_path / "files" / "file-fresh"
    for folder in (orphan, fresh):
        folder.mkdir()
    os.utime(orphan, (0, 0))
    with open(alive / ".lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with in_process(tmp_path, wait=False):
            assert left_in(tmp_path) == [".arriving-alive", "file-fresh"]


def test_what_is_moved_or_deleted_while_a_server_sweeps_stops_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".arriving-ended", "file-deleted"):
        (tmp_path / "files" / name).mkdir(parents=True)
    is_old = uploads._is_old

    def meanwhile(path: Path) -> bool:
        path.rmdir()
        return is_old(path)

    monkeypatch.setattr(uploads, "_is_old", meanwhile)
    with in_process(tmp_path, wait=False) as client:
        assert client.get("/livez").status_code == 200
    assert left_in(tmp_path) == []


def test_an_archive_within_an_archive_is_only_a_file(client: TestClient) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("../escaped.png", b"x")
    file = upload(client, zip_of({**photographs(), "daisy/inner.zip": inner.getvalue()})).json()
    assert file["summary"]["warnings"] == ["1 file not named like an image, left out: daisy/inner.zip"]
