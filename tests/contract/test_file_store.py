"""What the store of uploads promises, on SQLite and on PostgreSQL."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import Engine

from finetune.errors import Conflict, InvalidInput, NotFound
from finetune.jobs import creation
from finetune.jobs.files import FilesFull, FileStore, UploadedFile
from finetune.jobs.store import JobStore

LARGE = 5 << 30  # more than 32 bits can count


@pytest.fixture
def store(engine: Engine) -> FileStore:
    return FileStore(engine)


def upload(store: FileStore, owner: str = "ada", **given: Any) -> tuple[UploadedFile, bool]:
    described = {"filename": "f.zip", "purpose": "fine-tune", "size_bytes": 7, "sha256": "0" * 64, "summary": {"classes": ["ü"]}}
    return store.create(owner, **{**described, "place": lambda _: None, **given})


def test_an_upload_is_kept_as_it_was_described(store: FileStore) -> None:
    placed: list[str] = []
    file, new = upload(store, filename="blüten.zip", size_bytes=LARGE, place=placed.append)
    assert new
    assert placed == [file.id]
    assert store.get(file.id, "ada") == file
    assert (file.filename, file.size_bytes, file.summary, file.owner) == ("blüten.zip", LARGE, {"classes": ["ü"]}, "ada")


def test_an_upload_whose_contents_cannot_be_placed_is_not_there(store: FileStore) -> None:
    def fail(_: str) -> None:
        raise OSError("no such folder")

    with pytest.raises(OSError, match="no such folder"):
        upload(store, place=fail, idempotency_key="k", body_sha256="b")
    assert store.list() == ([], False)
    assert upload(store, idempotency_key="k", body_sha256="b")[1], "its key is free"


def test_another_owners_upload_does_not_exist(store: FileStore) -> None:
    file, _ = upload(store, "ada")
    for ask in (store.get, store.delete):
        with pytest.raises(NotFound, match=f"no file '{file.id}'"):
            ask(file.id, "bob")
    assert store.list("bob") == ([], False)
    assert store.get(file.id) == file, "no owner: everybody's"
    assert store.ids() == {file.id}


def test_pages_are_newest_first(store: FileStore) -> None:
    made = [upload(store, "ada")[0] for _ in range(3)]
    upload(store, "bob")
    assert store.list("ada", limit=2) == ([made[2], made[1]], True)
    assert store.list("ada", limit=2, after=made[1].id) == ([made[0]], False)


def test_the_same_key_and_body_give_the_same_upload(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = upload(store, idempotency_key="k", body_sha256="b")
    assert upload(store, idempotency_key="k", body_sha256="b") == (first, False)
    assert upload(store, "bob", idempotency_key="k", body_sha256="other")[1], "keys are each owner's own"
    with pytest.raises(InvalidInput, match="'k' was used before with another body"):
        upload(store, idempotency_key="k", body_sha256="c")
    monkeypatch.setattr(creation, "IDEMPOTENCY_SECONDS", -1.0)
    assert upload(store, idempotency_key="k", body_sha256="c")[1], "it is forgotten after a day"


def test_a_deleted_upload_is_gone_and_so_is_its_key(store: FileStore) -> None:
    file, _ = upload(store, idempotency_key="k", body_sha256="b")
    store.delete(file.id, "ada")
    with pytest.raises(NotFound):
        store.get(file.id)
    assert upload(store, idempotency_key="k", body_sha256="b")[1]


def test_an_upload_that_an_unfinished_job_reads_stays(store: FileStore, engine: Engine) -> None:
    file, _ = upload(store)
    jobs = JobStore(engine)
    job, _ = jobs.create("ada", {"training_file": f"/home/files/{file.id}"}, spec_digest="0" * 64)
    with pytest.raises(Conflict, match=f"{file.id} is read by {job.id}"):
        store.delete(file.id, "ada")
    jobs.request_cancel(job.id)
    store.delete(file.id, "ada")


def test_a_job_cannot_be_queued_for_an_upload_that_is_gone(store: FileStore, engine: Engine) -> None:
    file, _ = upload(store)
    jobs = JobStore(engine)
    job, _ = jobs.create("ada", {"training_file": f"/files/{file.id}"}, spec_digest="0", reads=[file.id])
    jobs.request_cancel(job.id)
    store.delete(file.id)
    with pytest.raises(NotFound, match=f"{file.id} was deleted"):
        jobs.create("ada", {"training_file": f"/files/{file.id}"}, spec_digest="0", reads=[file.id], idempotency_key="k")
    assert [one.id for one in jobs.newest(10)] == [job.id]


def test_an_owners_uploads_stay_within_the_quota_also_when_they_come_at_once(store: FileStore) -> None:
    upload(store, "bob", size_bytes=LARGE)
    ready, refused = threading.Barrier(6), []

    def add() -> None:
        ready.wait()
        try:
            upload(store, size_bytes=LARGE, max_owner_bytes=2 * LARGE + 1)
        except FilesFull as error:
            refused.append(error.message)

    threads = [threading.Thread(target=add) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 4
    assert (
        "takes 5,368,709,120 bytes on disk, your uploads, finished jobs and models take 10,737,418,240, and 10,737,418,241"
        in refused[0]
    )
    assert store.stored_bytes("ada") == 2 * LARGE
