"""Datasets that arrive in parts: in any order, again after a lost connection or a restart, and whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from archives import bad, photographs, zip_of
from serving import END_SECONDS, in_process, live_server
from starlette.requests import Request
from starlette.testclient import TestClient
from starlette.types import Message

from finetune.errors import Conflict, NotFound, Overloaded
from finetune.jobs.database import open_jobs
from finetune.jobs.http import Connection, ServerUnreachable
from finetune.jobs.keys import KeyStore
from service.part_uploads import KEPT_SECONDS, MAX_PENDING_OF_AN_OWNER, PartUploads
from service.uploads import Arrival, Uploads

ARCHIVE = zip_of(photographs())
HALF = len(ARCHIVE) // 2


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with in_process(tmp_path, wait=False) as client:
        yield client


def begin(client: TestClient, data: bytes = ARCHIVE, headers: dict[str, str] | None = None, **more: Any) -> Any:
    wanted = {"filename": "flowers.zip", "purpose": "fine-tune", "bytes": len(data), **more}
    return client.post("/v1/uploads", json=wanted, headers=headers or {})


def add(client: TestClient, upload: str, data: bytes, **fields: Any) -> Any:
    return client.post(f"/v1/uploads/{upload}/parts", files={"data": ("part", data)}, data=fields)


def complete(client: TestClient, upload: str, *parts: str, **more: Any) -> Any:
    return client.post(f"/v1/uploads/{upload}/complete", json={"part_ids": list(parts), **more})


def left_in(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "files").iterdir() if not path.name.endswith(".lock"))


def test_parts_in_any_order_become_the_file_that_one_upload_would_be(client: TestClient, tmp_path: Path) -> None:
    answer = begin(client, mime_type="application/zip")
    upload = answer.json()
    assert (answer.status_code, upload["status"], upload["parts"], upload["file"]) == (201, "pending", [], None)
    assert answer.headers["location"] == f"/v1/uploads/{upload['id']}"
    second = add(client, upload["id"], ARCHIVE[HALF:], part_number=2).json()
    first = add(client, upload["id"], ARCHIVE[:HALF], part_number=1).json()
    assert (first["object"], first["upload_id"], first["bytes"]) == ("upload.part", upload["id"], HALF)
    assert client.get(f"/v1/uploads/{upload['id']}").json()["parts"] == [first, second]
    md5 = hashlib.md5(ARCHIVE, usedforsecurity=False).hexdigest()
    done = complete(client, upload["id"], first["id"], second["id"], md5=md5).json()
    assert (done["status"], done["parts"]) == ("completed", [])
    whole = client.post("/v1/files", files={"file": ("flowers.zip", ARCHIVE)}, data={"purpose": "fine-tune"}).json()
    for key in ("bytes", "filename", "purpose", "sha256", "summary", "stored_bytes"):
        assert done["file"][key] == whole[key], key
    assert complete(client, upload["id"], "whatever").json() == done  # asked again, it is what it is
    assert add(client, upload["id"], b"more").status_code == 409
    assert left_in(tmp_path) == sorted([f".{upload['id']}", done["file"]["id"], whole["id"]])
    assert [path.name for path in (tmp_path / "files" / f".{upload['id']}").iterdir() if path.suffix == ".json"] == [
        "upload.json"
    ]


def test_what_has_arrived_outlives_the_server(tmp_path: Path) -> None:
    key = {"Idempotency-Key": "the-folder-flowers"}
    with in_process(tmp_path, wait=False) as client:
        upload = begin(client, headers=key).json()["id"]
        first = add(client, upload, ARCHIVE[:HALF], part_number=1).json()
    with in_process(tmp_path, wait=False) as client:
        again = begin(client, headers=key)
        assert (again.json()["id"], again.headers["idempotent-replayed"]) == (upload, "true")
        assert again.json()["parts"] == [first]
        second = add(client, upload, ARCHIVE[HALF:]).json()
        assert second["part_number"] == 2
        assert complete(client, upload, first["id"], second["id"]).json()["file"]["bytes"] == len(ARCHIVE)
        assert begin(client, headers=key).json()["status"] == "completed"
        assert begin(client, headers=key, filename="other.zip").status_code == 422


def test_a_part_that_is_sent_again_takes_the_place_of_the_first(client: TestClient) -> None:
    upload = begin(client).json()["id"]
    damaged = add(client, upload, b"\0" * HALF, part_number=1).json()
    first = add(client, upload, ARCHIVE[:HALF], part_number=1).json()
    second = add(client, upload, ARCHIVE[HALF:], part_number=2).json()
    assert [part["id"] for part in client.get(f"/v1/uploads/{upload}").json()["parts"]] == [first["id"], second["id"]]
    refused = complete(client, upload, damaged["id"], second["id"])
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "part_ids[0]")
    assert complete(client, upload, first["id"], second["id"]).status_code == 200


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"bytes": 0}, "bytes"),
        ({"bytes": 1 << 50}, "bytes"),
        ({"bytes": "5"}, "bytes"),
        ({"purpose": "assistants"}, "purpose"),
        ({"filename": ""}, "filename"),
        ({"owner": "bob"}, "owner"),
    ],
)
def test_what_cannot_arrive_is_refused_before_it_does(
    change: dict[str, Any], field: str, client: TestClient, tmp_path: Path
) -> None:
    answer = begin(client, **change)
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)
    assert not (tmp_path / "files").exists() or left_in(tmp_path) == []


def test_parts_that_do_not_make_up_the_whole_are_refused_and_stay(client: TestClient) -> None:
    upload = begin(client).json()["id"]
    first = add(client, upload, ARCHIVE[:HALF]).json()["id"]
    assert add(client, upload, ARCHIVE).json()["errors"][0]["field"] == "data"  # more than was announced
    assert "make up" in complete(client, upload, first).json()["errors"][0]["detail"]
    second = add(client, upload, ARCHIVE[HALF:]).json()["id"]
    assert "named twice" in complete(client, upload, first, first, second).text
    assert (
        complete(client, upload, second, first, md5=hashlib.md5(ARCHIVE, usedforsecurity=False).hexdigest()).json()["errors"][0][
            "field"
        ]
        == "md5"
    )
    assert complete(client, upload, first, second).json()["status"] == "completed"


@pytest.mark.parametrize(
    ("part", "data", "field"),
    [
        ({"file": ("part", b"x")}, {}, "data"),
        ({"data": ("part", b"")}, {}, "data"),
        ({"data": ("part", b"x")}, {"part_number": "0"}, "part_number"),
        ({"data": ("part", b"x")}, {"part_number": "9" * 30}, "part_number"),
        ({"data": ("part", b"x")}, {"part_number": "000000001" + "9" * 300}, "part_number"),
        ({"data": ("part", b"x")}, {"part_number": "10001"}, "part_number"),
        ({"data": ("part", b"x")}, {"part_number": "²"}, "part_number"),
        ({"data": ("part", b"x")}, {"name": "x"}, "name"),
    ],
)
def test_a_part_that_is_none_is_refused_by_its_field(part: Any, data: Any, field: str, client: TestClient) -> None:
    upload = begin(client).json()["id"]
    answer = client.post(f"/v1/uploads/{upload}/parts", files=part, data=data)
    assert answer.status_code == 422
    assert field in [error["field"] for error in answer.json()["errors"]]
    assert client.get(f"/v1/uploads/{upload}").json()["parts"] == []


def test_what_is_refused_for_what_it_holds_stays_for_another_try(client: TestClient, tmp_path: Path) -> None:
    upload = begin(client).json()["id"]
    first, second = (add(client, upload, part).json()["id"] for part in (ARCHIVE[:HALF], ARCHIVE[HALF:]))
    answer = complete(client, upload, second, first)  # in the wrong order, it is no archive
    assert answer.status_code == 422
    assert complete(client, upload, first, second).json()["status"] == "completed"
    data, _ = bad()["tar: parent"]
    upload = begin(client, data).json()["id"]
    answer = complete(client, upload, add(client, upload, data).json()["id"])
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_archive")
    assert client.post(f"/v1/uploads/{upload}/cancel").status_code == 200


def test_a_cancelled_upload_is_gone_and_one_that_is_complete_stays(client: TestClient, tmp_path: Path) -> None:
    upload = begin(client).json()["id"]
    add(client, upload, ARCHIVE[:HALF])
    assert client.post(f"/v1/uploads/{upload}/cancel").json()["status"] == "cancelled"
    for answer in (client.get(f"/v1/uploads/{upload}"), add(client, upload, b"x"), complete(client, upload, "part-x")):
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert client.get("/v1/uploads/..").status_code == 404
    assert left_in(tmp_path) == []
    upload = begin(client).json()["id"]
    file = complete(client, upload, add(client, upload, ARCHIVE).json()["id"]).json()["file"]
    assert client.post(f"/v1/uploads/{upload}/cancel").status_code == 409
    client.delete(f"/v1/files/{file['id']}")
    assert "was deleted" in client.get(f"/v1/uploads/{upload}").json()["detail"]
    assert left_in(tmp_path) == []  # nothing that later uploads would have to read


def test_a_cancellation_waits_for_a_completion_and_finds_it_done(tmp_path: Path) -> None:
    """Both at once, at the moment at which the parts are being put together."""
    uploads = PartUploads(tmp_path / "files")
    upload, _ = uploads.create("ann", "a.zip", "fine-tune", 4)
    (tmp_path / "part").write_bytes(b"data")
    part = uploads.add(upload, tmp_path / "part", None)
    answers: list[object] = []

    def cancel() -> None:
        try:
            uploads.cancel(upload)
        except Conflict as error:
            answers.append(error)

    with uploads.completing(upload, [part.id], tmp_path / "archive") as known:
        cancelling = threading.Thread(target=cancel)
        cancelling.start()
        cancelling.join(timeout=0.2)
        assert cancelling.is_alive()
        uploads.completed(known, "file-1")
    cancelling.join(timeout=60)
    assert "is complete" in str(answers)
    assert (tmp_path / "archive").read_bytes() == b"data"


def test_what_was_cancelled_in_between_is_not_found(tmp_path: Path) -> None:
    uploads = PartUploads(tmp_path / "files")
    upload, _ = uploads.create("ann", "a.zip", "fine-tune", 4)
    uploads.cancel(upload)
    (tmp_path / "part").write_bytes(b"data")
    with pytest.raises(NotFound):
        uploads.parts(upload)
    with pytest.raises(NotFound):
        uploads.expires_at(upload)
    with pytest.raises(NotFound):
        uploads.add(upload, tmp_path / "part", None)
    with pytest.raises(NotFound), uploads.completing(upload, [], tmp_path / "archive"):
        pass
    assert [path.name for path in (tmp_path / "files").iterdir()] == [".uploads.lock"]


def test_uploads_are_listed_newest_first_and_too_many_are_refused(client: TestClient) -> None:
    begun = [begin(client).json()["id"] for _ in range(MAX_PENDING_OF_AN_OWNER)]
    refused = begin(client)
    assert refused.status_code == 409
    assert "GET /v1/uploads lists them" in refused.json()["detail"]
    first = client.get("/v1/uploads", params={"limit": 10}).json()
    rest = client.get("/v1/uploads", params={"limit": 10, "after": first["last_id"]}).json()
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert [one["id"] for page in (first, rest) for one in page["data"]] == begun[::-1]


def test_an_upload_is_its_owners_alone_and_counts_against_the_quota(tmp_path: Path) -> None:
    keys = KeyStore(open_jobs(tmp_path))
    ann, bob = ({"Authorization": f"Bearer {keys.create(name, ('jobs',))[0]}"} for name in ("ann", "bob"))
    with in_process(tmp_path, wait=False, max_files_bytes=3 * len(ARCHIVE)) as client:
        upload = begin(client, headers=ann).json()["id"]
        assert client.get(f"/v1/uploads/{upload}", headers=bob).status_code == 404
        assert client.post(f"/v1/uploads/{upload}/cancel", headers=bob).status_code == 404
        assert [begin(client, headers=ann).status_code for _ in range(3)] == [201, 201, 413]
        assert begin(client, headers=bob).status_code == 201
        whole = {"files": {"file": ("flowers.zip", ARCHIVE)}, "data": {"purpose": "fine-tune"}}
        refused = client.post("/v1/files", headers=ann, **whole)  # what is announced takes its place
        assert refused.status_code == 413
        assert "/v1/uploads/{id}/cancel" in refused.json()["detail"]


def test_what_nobody_goes_on_with_is_removed_after_a_day(client: TestClient, tmp_path: Path) -> None:
    old, new = (begin(client).json()["id"] for _ in range(2))
    long_ago = time.time() - KEPT_SECONDS - 60
    os.utime(tmp_path / "files" / f".{old}", (long_ago, long_ago))
    latest = begin(client).json()["id"]
    assert left_in(tmp_path) == sorted([f".{new}", f".{latest}"])


def test_silent_uploads_make_room_and_no_owner_keeps_more_places_than_others_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.uploads.SILENCE_SECONDS", 0.0)
    monkeypatch.setattr("service.uploads.MAX_AT_ONCE", 3)
    (tmp_path / "files").mkdir()
    uploads, gone = Uploads(tmp_path / "files"), []

    async def send(owner: str, pieces: list[bytes], leaves: asyncio.Event) -> str:
        async def receive() -> Message:
            if pieces:
                return {"type": "http.request", "body": pieces.pop(), "more_body": True}
            await leaves.wait()
            return {"type": "http.request", "body": b"end", "more_body": False}

        try:
            with uploads.arriving(0, owner) as arrival:
                return b"".join([chunk async for chunk in arrival.body_of(Request({"type": "http"}, receive))]).decode()
        except Overloaded as error:
            gone.append(owner)
            return error.message

    async def scenario() -> None:
        leaves = asyncio.Event()

        def begin(owner: str, *pieces: bytes) -> asyncio.Task[str]:
            return asyncio.create_task(send(owner, list(pieces), leaves))

        async def settled() -> None:
            for _ in range(10):
                await asyncio.sleep(0)

        first = [begin("ann", b"much" * 10), begin("ann", b"a"), begin("bob", b"b")]
        await settled()
        monkeypatch.setattr(Arrival, "is_silent", False)
        first.append(begin("cid", b"c"))
        await settled()
        assert gone == ["ann"], "who has most gives the slowest"
        assert "made room for another" in await first[1]
        assert "uploads are arriving already" in await begin("dan"), "each has one: nobody has to go"
        monkeypatch.setattr(Arrival, "is_silent", property(lambda arrival: arrival.owner == "bob"))
        first.append(begin("eve", b"e"))
        await settled()
        assert gone == ["ann", "dan", "bob"], "what is silent gives its place to anybody"
        leaves.set()
        assert [await first[number] for number in (0, 3, 4)] == ["much" * 10 + "end", "cend", "eend"]

    asyncio.run(scenario())
    assert left_in(tmp_path) == []


class Unsteady(httpx.HTTPTransport):
    """A network over which only the parts with these numbers, counted from 1 as they are sent, arrive."""

    def __init__(self, arriving: set[int]) -> None:
        super().__init__()
        self._arriving = arriving
        self.n_parts = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/parts"):
            self.n_parts += 1
            if self.n_parts not in self._arriving:
                raise httpx.ConnectError("the network is gone")
        return super().handle_request(request)


@pytest.mark.longer
def test_our_client_goes_on_where_it_was_interrupted_also_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.jobs.http.PART_BYTES", -(-len(ARCHIVE) // 4))
    monkeypatch.setattr("finetune.jobs.http._FIRST_PAUSE_SECONDS", 0.001)
    path = tmp_path / "flowers.zip"
    path.write_bytes(ARCHIVE)
    with live_server(tmp_path, ready=False) as server:

        def send(transport: httpx.BaseTransport | None = None) -> dict[str, Any]:
            connection = Connection(server.url, transport=transport)
            with connection.http:
                return connection.upload(path)

        lost = Unsteady({1, 3})  # the second part arrives when it is tried again, the third never
        with pytest.raises(ServerUnreachable):
            send(lost)
        found = Unsteady({1, 2})
        file = send(found)
        assert (found.n_parts, file["bytes"], file["sha256"]) == (2, len(ARCHIVE), hashlib.sha256(ARCHIVE).hexdigest())
        again = Unsteady(set())
        assert send(again) == file
        assert again.n_parts == 0
        httpx.delete(f"{server.url}/v1/files/{file['id']}", timeout=END_SECONDS)
        assert send()["id"] != file["id"]
