"""The public `openai` client, unmodified, with this server as its `base_url`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from archives import photographs, zip_of
from openai import OpenAI
from serving import LiveServer, live_server, registered, until
from standin import write_bundle

from finetune.jobs.database import open_jobs
from finetune.jobs.keys import KeyStore
from finetune.jobs.store import JobStore


@dataclass(frozen=True)
class Place:
    home: Path
    server: LiveServer
    secret: str

    def client(self, secret: str | None = None) -> OpenAI:
        return OpenAI(base_url=f"{self.server.url}/v1", api_key=secret or self.secret, max_retries=0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tell_backbones: Callable[[Path], object]) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("home")
    tell_backbones(home)
    registered(home, write_bundle(home / "bundle"))
    secret, _ = KeyStore(open_jobs(home)).create("ann", ["admin"])
    with live_server(home) as server:
        yield Place(home, server, secret)


@pytest.fixture
def client(place: Place) -> OpenAI:
    return place.client()


@pytest.fixture
def file_id(client: OpenAI) -> str:
    return client.files.create(file=("flowers.zip", zip_of(photographs())), purpose="fine-tune").id


def test_a_large_file_goes_up_in_parts(client: OpenAI, tmp_path: Path) -> None:
    archive = tmp_path / "flowers.zip"
    archive.write_bytes(zip_of(photographs()))
    size = archive.stat().st_size
    upload = client.uploads.upload_file_chunked(
        file=archive, mime_type="application/zip", purpose="fine-tune", part_size=size // 3
    )
    assert upload.status == "completed"
    assert upload.file is not None
    assert (upload.file.filename, upload.file.bytes) == ("flowers.zip", size)
    assert client.files.retrieve(upload.file.id) == upload.file
    begun = client.uploads.create(filename="more.zip", bytes=10, mime_type="application/zip", purpose="fine-tune")
    assert client.uploads.cancel(begun.id).status == "cancelled"


def test_files_go_up_are_listed_and_deleted(client: OpenAI, tmp_path: Path) -> None:
    archive = tmp_path / "flowers.zip"
    archive.write_bytes(zip_of(photographs()))
    with open(archive, "rb") as stream:
        made = client.files.create(file=stream, purpose="fine-tune")
    assert (made.object, made.filename, made.bytes, made.status) == ("file", "flowers.zip", archive.stat().st_size, "processed")
    found = client.files.retrieve(made.id)
    assert found == made
    assert made.id in [file.id for file in client.files.list(limit=1)]  # turns every page
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_a_job_is_created_listed_looked_at_and_cancelled(client: OpenAI, file_id: str) -> None:
    job = client.fine_tuning.jobs.create(
        model="resnet18",
        training_file=file_id,
        suffix="flowers",
        seed=3,
        metadata={"team": "garden"},
        hyperparameters={"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5},
    )
    assert (job.object, job.status, job.model, job.training_file, job.seed) == (
        "fine_tuning.job", "queued", "resnet18", file_id, 3,
    )  # fmt: skip
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, "auto")
    assert job.hyperparameters.learning_rate_multiplier == 0.5
    assert (job.metadata, job.fine_tuned_model, job.error) == ({"team": "garden"}, None, None)
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    others = [client.fine_tuning.jobs.create(model="resnet18", training_file=file_id).id for _ in range(2)]
    listed = [one.id for one in client.fine_tuning.jobs.list(limit=1)]
    assert listed[:3] == [others[1], others[0], job.id]
    for job_id in (job.id, *others):
        assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=1))
    assert [event.message for event in events] == ["The job was cancelled while it was queued.", "The job is queued."]
    assert {(event.object, event.level) for event in events} == {("fine_tuning.job.event", "info")}
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []


def test_method_and_extra_body_reach_what_the_client_does_not_know(client: OpenAI, file_id: str) -> None:
    stock = client.fine_tuning.jobs.create(
        model="resnet18",
        training_file=file_id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4}}},
    )
    assert (stock.hyperparameters.n_epochs, stock.method and stock.method.type) == (4, "linear_probe")
    ours = client.fine_tuning.jobs.create(
        model="resnet18",
        training_file=file_id,
        extra_body={"method": {"type": "partial", "stages": 1}, "augmentation": "light", "data": {"val_fraction": 0.2}},
    )
    assert ours.to_dict()["method"]["stages"] == 1  # type: ignore[index]
    for job in (stock, ours):
        client.fine_tuning.jobs.cancel(job.id)


def test_a_state_that_the_client_does_not_know_arrives_by_its_name(place: Place, client: OpenAI, file_id: str) -> None:
    job = client.fine_tuning.jobs.create(model="resnet18", training_file=file_id)
    store = JobStore(open_jobs(place.home))
    claim = store.claim("worker")
    assert claim is not None
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelling"
    with pytest.raises(openai.ConflictError):
        client.files.delete(file_id)
    store.finish(claim, "cancelled")
    assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"


def test_a_failure_is_read_as_the_jobs_error(place: Place, client: OpenAI, file_id: str) -> None:
    job = client.fine_tuning.jobs.create(model="resnet18", training_file=file_id)
    store = JobStore(open_jobs(place.home))
    claim = store.claim("worker")
    assert claim is not None
    store.finish(claim, "failed", error_code="unknown_backbone", error_message="no such backbone")
    error = client.fine_tuning.jobs.retrieve(job.id).error
    assert error is not None
    assert (error.code, error.message, error.param) == ("unknown_backbone", "no such backbone", "model")


def test_models_are_listed_looked_at_and_deleted(place: Place, client: OpenAI) -> None:
    registered(place.home, write_bundle(place.home / "second"), "second")
    assert [model.id for model in client.models.list()] == ["colours", "second"]
    found = client.models.retrieve("second")
    assert (found.id, found.object, found.owned_by) == ("second", "model", "finetune")
    deleted = client.models.delete("second")
    assert (deleted.id, deleted.deleted, deleted.object) == ("second", True, "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("second")


def test_our_errors_are_its_own_exceptions(place: Place, client: OpenAI, file_id: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.fine_tuning.jobs.retrieve("ftjob-nothing")
    assert missing.value.code == "not_found"
    assert "ftjob-nothing" in missing.value.message
    with pytest.raises(openai.UnprocessableEntityError) as wrong:
        client.fine_tuning.jobs.create(model="resnet18", training_file=file_id, hyperparameters={"n_epochs": 0})
    assert (wrong.value.code, wrong.value.param, wrong.value.type) == (
        "invalid_spec", "hyperparameters.n_epochs", "invalid_request_error",
    )  # fmt: skip
    assert wrong.value.request_id is not None
    with pytest.raises(openai.UnprocessableEntityError, match="points out of the archive"):
        client.files.create(file=("x.zip", zip_of({"../x.png": b"x"})), purpose="fine-tune")
    with pytest.raises(openai.AuthenticationError):
        place.client("ft_nobody_x").models.list()
    narrow, _ = KeyStore(open_jobs(place.home)).create("bob", ["predict"])
    with pytest.raises(openai.PermissionDeniedError):
        place.client(narrow).fine_tuning.jobs.list()


@pytest.mark.longer
@pytest.mark.usefixtures("known_backbones")
def test_a_full_queue_is_its_rate_limit_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_MAX_UNFINISHED_JOBS", "1")
    registered(tmp_path, write_bundle(tmp_path / "bundle"))
    with live_server(tmp_path) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        file_id = client.files.create(file=("flowers.zip", zip_of(photographs())), purpose="fine-tune").id
        client.fine_tuning.jobs.create(model="resnet18", training_file=file_id)
        with pytest.raises(openai.RateLimitError) as full:
            client.fine_tuning.jobs.create(model="resnet18", training_file=file_id)
        assert full.value.code == "queue_full"


@pytest.mark.slow
def test_a_whole_run_with_a_real_worker_ends_in_a_served_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    members = photographs({"daisy": 12, "rose": 12})
    with live_server(tmp_path, worker=True, ready=False) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        file = client.files.create(file=("flowers.zip", zip_of(members)), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model="test_efficientnet",
            training_file=file.id,
            suffix="flowers",
            hyperparameters={"n_epochs": 2},
            extra_body={"model": {"backbone": "test_efficientnet", "weights": "none", "input_size_px": 64}, "method": "full"},
        )
        ended = ("succeeded", "failed", "cancelled")
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).status in ended, seconds=240)
        job = client.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", (job.error, (tmp_path / "server.log").read_text()[-2000:])
        assert job.fine_tuned_model == "flowers"
        answer = httpx.post(f"{server.url}/v1/models/{job.fine_tuned_model}/predict", content=members["daisy/0.png"], timeout=240)
        assert answer.status_code == 200
        assert {row["label"] for row in answer.json()["predictions"]} == {"daisy", "rose"}
        assert [model.id for model in client.models.list()] == ["flowers"]
        assert any("registered" in event.message for event in client.fine_tuning.jobs.list_events(job.id))
        assert "step_number" in client.fine_tuning.jobs.checkpoints.list(job.id).data[0].to_dict()
        workers = _processes_with(str(tmp_path))
        assert len(workers) >= 2
    until(lambda: not _processes_with(str(tmp_path)))


def _processes_with(home: str) -> list[int]:
    """Processes whose workspace this is."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"FINETUNE_HOME={home}\0".encode() in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:
            continue
    return found
