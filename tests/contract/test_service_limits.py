"""What one client may cost the others: specs, metadata, disk, the queue, and a database or a disk that does not answer."""

from __future__ import annotations

import errno
import io
import json
import random
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from archives import photographs, zip_of
from folders import write_classes
from job_standin import submit
from serving import in_process, registered
from standin import picture, write_bundle
from starlette.testclient import TestClient

from finetune.bundle.access import Access
from finetune.errors import StoreError
from finetune.jobs.database import open_jobs
from finetune.jobs.files import FileStore
from finetune.jobs.history import Update
from finetune.jobs.keys import KeyStore
from finetune.jobs.store import JobStore
from service.event_streams import EventStreams

pytestmark = pytest.mark.usefixtures("uploads_read_here")

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with in_process(tmp_path, wait=False) as client:
        yield client


def upload(client: TestClient, data: bytes, name: str = "photos.zip", **headers: str) -> Any:
    return client.post("/v1/files", files={"file": (name, data)}, data={"purpose": "fine-tune"}, headers=headers)


@pytest.fixture
def file_id(client: TestClient) -> str:
    return str(upload(client, zip_of(photographs())).json()["id"])


# --- specs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, str]]:
    """A server with nothing queued, and the id of an upload."""
    with in_process(tmp_path_factory.mktemp("checking"), wait=False) as client:
        yield client, str(upload(client, zip_of(photographs())).json()["id"])


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"augmentation": {"transforms": [{"Resize": {"height": 12_000, "width": 12_000}}]}}, "at most 10,000, given 12000"),
        ({"augmentation": {"transforms": [{"CoarseDropout": {"num_holes_range": [1, 5_000_000]}}]}}, "at most 10,000"),
        ({"augmentation": {"transforms": [{"Blur": {"name": "x" * 20_000}}]}}, "more than 16 KiB"),
        ({"compute": {"threads": 1024}}, "compute.threads: must be auto or at most"),
        ({"metadata": {"note": "x" * 513}}, "metadata.note: a key has 1 to 64 characters and a value at most 512"),
        ({"metadata": {"k" * 65: "x"}}, "a key has 1 to 64 characters"),
    ],
)
def test_a_job_that_cannot_or_must_not_run_is_refused_before_it_is_queued(
    checking: tuple[TestClient, str], changes: dict[str, Any], said: str
) -> None:
    client, file_id = checking
    answer = client.post(JOBS, json={"training_file": file_id, **changes})
    assert answer.status_code == 422
    assert said in json.dumps(answer.json(), ensure_ascii=False)
    assert client.get(JOBS).json()["data"] == []


def test_what_only_the_training_libraries_know_is_refused_too_and_all_of_it_is_told(checking: tuple[TestClient, str]) -> None:
    client, file_id = checking
    transforms = [{"HorizontalFlop": {"p": 0.5}}, {"HorizontalFlip": {"p": 7.0}}]
    body = {"training_file": file_id, "model": "gpt-4o", "augmentation": {"transforms": transforms}}
    answer = client.post(JOBS, json=body)
    assert answer.status_code == 422
    told = {one["field"]: one["detail"] for one in answer.json()["errors"]}
    assert list(told) == ["model.backbone", "augmentation.transforms[0]", "augmentation.transforms[1].HorizontalFlip"]
    assert told["model.backbone"].startswith("timm has no architecture 'gpt-4o'")
    assert told["augmentation.transforms[0]"].startswith("unknown transform 'HorizontalFlop'")
    assert client.get(JOBS).json()["data"] == []


@pytest.mark.parametrize(
    ("number", "said"),
    [
        ("1e999", "1e999 is too large for a number"),
        ("-1e999", "-1e999 is too large for a number"),
        ("NaN", "NaN is not a number in JSON"),
        ("Infinity", "Infinity is not a number in JSON"),
    ],
)
def test_a_number_that_is_not_finite_is_refused_with_its_field(checking: tuple[TestClient, str], number: str, said: str) -> None:
    client, file_id = checking
    body = f'{{"training_file": "{file_id}", "augmentation": {{"transforms": [{{"HorizontalFlip": {{"p": {number}}}}}]}}}}'
    answer = client.post(JOBS, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"field": "augmentation.transforms[0].HorizontalFlip.p", "detail": said}]


@pytest.mark.parametrize("levels", [17, 400])
def test_a_value_that_is_nested_too_deeply_is_refused_with_its_field(checking: tuple[TestClient, str], levels: int) -> None:
    client, file_id = checking
    transforms = [{"OneOf": {"transforms": nested(levels)}}]
    answer = client.post(JOBS, json={"training_file": file_id, "augmentation": {"transforms": transforms}})
    assert answer.status_code == 422
    field = "augmentation.transforms[0].OneOf.transforms" + "[0]" * 12  # 16 levels in all
    assert answer.json()["errors"] == [{"field": field, "detail": "nested more than 16 levels deep"}]


@pytest.mark.longer
def test_a_good_name_and_good_transforms_are_accepted(client: TestClient, file_id: str) -> None:
    transforms = [{"HorizontalFlip": {"p": 0.5}}, {"OneOf": {"transforms": [{"Blur": {"p": 1.0}}, {"ToGray": {}}], "p": 0.2}}]
    body = {"training_file": file_id, "model": "resnet18", "augmentation": {"transforms": transforms}}
    assert client.post(JOBS, json=body).status_code == 201


@pytest.mark.parametrize(
    "path", [f"{JOBS}/ftjob-%00", f"{JOBS}/%00/events", "/v1/files/file-%00", f"{JOBS}?after=%00", "/v1/models/%00"]
)
def test_a_nul_in_an_id_is_not_found_or_invalid(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (404, 422)


# --- disk -----------------------------------------------------------------------------------------


def test_an_upload_counts_as_what_it_takes_on_disk(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in photographs().items():
            archive.writestr(name, data)
        padding = b"".join(random.Random(block).randbytes(1000) + bytes(49_000) for block in range(84))
        archive.writestr("daisy/padding.bin", padding, zipfile.ZIP_DEFLATED, 9)
    with in_process(tmp_path, wait=False, max_files_bytes=6 << 20) as client:
        first = upload(client, stream.getvalue())
        assert first.status_code == 201
        assert first.json()["bytes"] < 500_000
        assert first.json()["stored_bytes"] >= 4 << 20
        second = upload(client, stream.getvalue(), "again.zip")
        assert (second.status_code, second.json()["code"]) == (413, "files_full")
        assert client.delete(f"/v1/files/{first.json()['id']}").status_code == 200
        assert upload(client, stream.getvalue(), "again.zip").status_code == 201


def test_models_count_and_who_is_over_the_quota_starts_nothing_more(tmp_path: Path) -> None:
    registry = registered(tmp_path, write_bundle(tmp_path / "bundle"))
    registry.reserve("hers", Access("ann", "private"))
    registry.register(tmp_path / "bundle", "hers")
    size = registry.owned_bytes("ann")
    assert size > sum(path.stat().st_size for path in (tmp_path / "bundle").iterdir()) * 0.9
    assert registry.owned_bytes("bob") == 0
    keys = KeyStore(open_jobs(tmp_path))
    ann, bob = ({"Authorization": f"Bearer {keys.create(who, ['jobs', 'predict'])[0]}"} for who in ("ann", "bob"))
    birds = str(write_classes(tmp_path / "birds", {"owl": 2, "wren": 2}))
    for room, status in ((-1, 413), (1 << 20, 201)):
        with in_process(tmp_path, wait=False, max_files_bytes=size + room, data_roots=(tmp_path,)) as client:
            for path, body in (
                (JOBS, {"training_file": birds}),
                ("/v1/batch_predictions", {"input_file": birds, "model": "hers"}),
            ):
                answer = client.post(path, json=body, headers=ann)
                assert answer.status_code == status, answer.text
            assert client.post(JOBS, json={"training_file": birds}, headers=bob).status_code == 201
            if status == 413:
                assert answer.json()["code"] == "files_full"
                assert "models take" in answer.json()["detail"]
                archive = {"file": ("a.zip", zip_of(photographs()))}
                full = client.post("/v1/files", files=archive, data={"purpose": "fine-tune"}, headers=ann)
                assert full.status_code == 413


def test_a_finished_job_counts_until_it_is_deleted_with_its_folder(client: TestClient, tmp_path: Path) -> None:
    store = JobStore(open_jobs(tmp_path))
    job = submit(store, steps=1)
    folder = tmp_path / "runs" / job.id
    folder.mkdir(parents=True)
    assert client.delete(f"{JOBS}/{job.id}").status_code == 409
    claim = store.claim("worker")
    assert claim is not None
    store.finish(claim, "failed", error_code="x", error_message="x", stored_bytes=12_345)
    assert FileStore(store.engine).stored_bytes(job.owner) == 12_345
    assert client.delete(f"{JOBS}/{job.id}").json() == {"id": job.id, "object": "fine_tuning.job", "deleted": True}
    assert not folder.exists()
    assert client.get(f"{JOBS}/{job.id}").status_code == 404
    assert client.get(f"{JOBS}/{job.id}/events").status_code == 404
    assert client.delete(f"{JOBS}/{job.id}").status_code == 404


def test_a_disk_that_cannot_be_written_is_503_without_its_paths(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path))

    monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    answer = upload(client, zip_of(photographs()))
    assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
    assert str(tmp_path) not in answer.text


# --- the database ---------------------------------------------------------------------------------


def test_a_database_out_of_reach_shows_no_address_and_predictions_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered(tmp_path, write_bundle(tmp_path / "bundle"))
    secret, _ = KeyStore(open_jobs(tmp_path)).create("ann", ["predict", "jobs"])
    key = {"Authorization": f"Bearer {secret}"}

    def unreachable(*_: object, **__: object) -> None:
        raise StoreError("postgresql://ann:***@db.internal/jobs: the job database cannot be used: no route to host")

    clock = SimpleNamespace(monotonic=lambda: 1000.0, time=time.time)  # the key was accepted a moment ago, however slow this is
    monkeypatch.setattr("service.middleware.auth.time", clock)
    with in_process(tmp_path) as client:
        assert client.post("/predict", content=picture(), headers=key).status_code == 200
        monkeypatch.setattr(JobStore, "list", unreachable)
        refused = client.get(JOBS, headers=key)
        assert (refused.status_code, refused.json()["code"]) == (503, "store_unusable")
        assert "db.internal" not in refused.text
        monkeypatch.setattr(KeyStore, "verify", unreachable)
        other = client.get("/v1/models", headers={"Authorization": "Bearer ft_other_key"})
        assert (other.status_code, other.json()["code"]) == (503, "store_unusable")
        assert "db.internal" not in other.text
        assert client.post("/predict", content=picture(), headers=key).status_code == 200


def test_a_stream_of_events_ends_when_its_readers_key_is_revoked() -> None:
    import asyncio

    async def scenario() -> list[str]:
        running = Update("running", None, None, [])
        streams = EventStreams(lambda known: dict.fromkeys(known, running), lambda event: {}, comment_seconds=0.01)
        allowed = [True, True, False]
        return [frame async for frame in streams.follow("ftjob-1", still_allowed=lambda: allowed.pop(0))]

    frames = asyncio.run(scenario())
    assert 1 <= len(frames) <= 4
    assert set(frames) == {": the job goes on\n\n"}


# --- the queue ------------------------------------------------------------------------------------


def test_one_owners_long_queue_does_not_keep_others_waiting(tmp_path: Path) -> None:
    store = JobStore(open_jobs(tmp_path))
    for owner, number in (("ann", 4), ("bob", 2), ("cid", 1)):
        for _ in range(number):
            submit(store, owner=owner, steps=1)
    order = []
    for _ in range(7):
        claim = store.claim("worker")
        assert claim is not None
        order.append(claim.job.owner)
        store.finish(claim, "failed", error_code="x", error_message="x")
    assert order[:3] == ["ann", "bob", "cid"]
    assert order[3:5] == ["ann", "bob"]
    assert order[5:] == ["ann", "ann"]


def test_jobs_are_listed_by_their_metadata_or_the_filter_is_refused(client: TestClient, file_id: str) -> None:
    for team in ("a", "b", "a"):
        body = {"training_file": file_id, "suffix": "x", "metadata": {"team": team, "kind": "test"}}
        assert client.post(JOBS, json=body).status_code == 201
    assert len(client.get(f"{JOBS}?metadata[team]=a").json()["data"]) == 2
    assert len(client.get(f"{JOBS}?metadata[team]=b&metadata[kind]=test").json()["data"]) == 1
    assert client.get(f"{JOBS}?metadata[team]=c").json()["data"] == []
    for wrong in ("metadata=a", "metadata[team=a", "metadata[]=a", "metadata[a'b]=c", 'metadata[a"]=c'):
        assert client.get(f"{JOBS}?{wrong}").status_code == 422, wrong
