"""Fine-tuning jobs over HTTP: what is asked for, what is answered, and how a job is followed."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from archives import photographs, zip_of
from folders import write_classes
from serving import END_SECONDS, LiveServer, in_process, live_server, registered, until
from standin import picture, write_bundle
from starlette.testclient import TestClient

from finetune.bundle.access import Access
from finetune.jobs.database import open_jobs
from finetune.jobs.job import Claim
from finetune.jobs.keys import KeyStore
from finetune.jobs.store import JobStore
from finetune.storage.files import modified_ns

pytestmark = pytest.mark.usefixtures("uploads_read_here")

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with in_process(tmp_path, wait=False, data_roots=(tmp_path / "data",)) as client:
        yield client


@pytest.fixture
def file_id(client: TestClient) -> str:
    archive = ("Flowers.zip", zip_of(photographs()))
    return str(client.post("/v1/files", files={"file": archive}, data={"purpose": "fine-tune"}).json()["id"])


def create(client: TestClient, file_id: str, **body: Any) -> dict[str, Any]:
    answer = client.post(JOBS, json={"training_file": file_id, **body})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def problems(answer: Any) -> dict[str, str]:
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"].startswith("application/problem+json")
    return {one["field"]: one["detail"] for one in answer.json()["errors"]}


def claimed(home: Path) -> tuple[JobStore, Claim]:
    """A worker's side of the same database."""
    store = JobStore(open_jobs(home))
    claim = store.claim("worker")
    assert claim is not None
    return store, claim


# --- creating -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("known_backbones")
def test_a_job_is_answered_in_the_public_shape_and_in_our_own(client: TestClient, file_id: str) -> None:
    answer = client.post(
        JOBS, json={"training_file": file_id, "model": "resnet18", "method": {"type": "partial", "stages": 2}, "seed": 7}
    )
    job = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (201, f"{JOBS}/{job['id']}")
    expected = {
        "object": "fine_tuning.job", "status": "queued", "model": "resnet18", "seed": 7, "training_file": file_id,
        "validation_file": None, "fine_tuned_model": None, "finished_at": None, "error": None, "result_files": [],
        "trained_tokens": None, "organization_id": "local", "integrations": [], "metadata": {}, "estimated_finish": None,
        "suffix": "flowers", "queue_position": 0, "attempts": 0, "phase": None, "progress": None, "metrics": {},
    }  # fmt: skip
    assert expected.items() <= job.items()
    assert isinstance(job["created_at"], int)
    assert job["method"] == {"type": "partial", "stages": 2, "train": None, "warm_head": True, "bn": "frozen"}
    assert client.get(f"{JOBS}/{job['id']}").json() == job


def test_a_job_starts_from_a_registered_model_that_the_caller_may_use(tmp_path: Path) -> None:
    with in_process(tmp_path, wait=False) as client:
        registered(tmp_path, write_bundle(tmp_path / "bundle", with_weights=True))
        registered(tmp_path, write_bundle(tmp_path / "old"), "old")
        archive = ("Flowers.zip", zip_of(photographs()))
        file_id = client.post("/v1/files", files={"file": archive}, data={"purpose": "fine-tune"}).json()["id"]
        job = create(client, file_id, model="colours@1", suffix="more")
        assert job["model"] == "colours@1"
        refused = {
            "colours@2": "model 'colours' has no version or alias '2'. It has: 1",
            "nowhere@1": "no model 'nowhere'",
            "colours@champion": "give a registered model with the number of its version",
            "old@1": "made by an earlier release and keeps no weights",
            "./somewhere": "is neither a timm name nor a registered model",
            "local-dir:/etc": "is not a folder in this server's data folders",
        }
        for model, why in refused.items():
            found = problems(client.post(JOBS, json={"training_file": file_id, "model": model}))
            assert why in next(iter(found.values())), model


@pytest.mark.usefixtures("known_backbones")
def test_another_owners_private_model_is_nothing_to_start_from(tmp_path: Path) -> None:
    registry = registered(tmp_path, write_bundle(tmp_path / "bundle", with_weights=True))
    registry.set_access("colours", Access(owner="ann", visibility="private"))
    keys = KeyStore(open_jobs(tmp_path))
    ann, bob = ({"Authorization": f"Bearer {keys.create(name, ['jobs'])[0]}"} for name in ("ann", "bob"))
    with in_process(tmp_path, wait=False) as client:
        archive = ("Flowers.zip", zip_of(photographs()))
        ids = {
            name: client.post("/v1/files", files={"file": archive}, data={"purpose": "fine-tune"}, headers=key).json()["id"]
            for name, key in (("ann", ann), ("bob", bob))
        }
        body = {"training_file": ids["bob"], "model": "colours@1", "suffix": "stolen"}
        hidden = problems(client.post(JOBS, json=body, headers=bob))
        assert hidden["model.backbone"].startswith("no model 'colours'; GET /v1/models lists those that you may use")
        body = {"training_file": ids["ann"], "model": "colours@1", "suffix": "hers"}
        hers = client.post(JOBS, json=body, headers=ann)
        assert hers.status_code == 201, hers.text
        comparison = {"training_file": ids["bob"], "models": ["colours@1", "resnet18"], "methods": ["linear_probe"]}
        found = problems(client.post("/v1/fine_tuning/comparisons", json=comparison, headers=bob))
        assert "no model 'colours'" in next(iter(found.values()))


def test_the_worker_gets_the_spec_with_paths_and_the_client_sees_its_own_words(
    client: TestClient, file_id: str, tmp_path: Path
) -> None:
    job = create(client, file_id, metadata={"team": "garden"})
    stored = JobStore(open_jobs(tmp_path)).get(job["id"])
    assert stored.spec["training_file"] == str(tmp_path / "files" / file_id)
    assert stored.spec["suffix"] == "flowers"
    assert stored.request == {"training_file": file_id, "metadata": {"team": "garden"}}


@pytest.mark.parametrize(
    "body",
    [
        {"method": {"type": "supervised"}},
        {"method": "supervised"},
        {"method": None, "hyperparameters": None, "suffix": None, "seed": None, "metadata": None, "validation_file": None},
        {"integrations": []},
        {"method": {"type": "supervised", "supervised": {"hyperparameters": {}}}},
    ],
)
def test_the_stock_clients_words_for_nothing_special_mean_the_defaults(
    body: dict[str, Any], client: TestClient, file_id: str
) -> None:
    job, plain = create(client, file_id, **body), create(client, file_id)
    for field in ("method", "hyperparameters", "seed", "metadata", "model"):
        assert job[field] == plain[field]


@pytest.mark.parametrize("nested", [False, True])
def test_the_stock_hyperparameters_arrive(nested: bool, client: TestClient, file_id: str) -> None:
    given = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 0.5}
    body = {"method": {"type": "supervised", "supervised": {"hyperparameters": given}}} if nested else {"hyperparameters": given}
    found = create(client, file_id, **body)["hyperparameters"]
    assert given.items() <= found.items()


def test_every_problem_is_told_at_once_with_its_path(client: TestClient) -> None:
    answer = client.post(
        JOBS,
        json={
            "training_file": "file-nothing", "hyperparameters": {"n_epochs": 0, "nope": 1}, "metod": {}, "seed": True,
            "suffix": "No Spaces", "data": {"val_fraction": 2},
        },
    )  # fmt: skip
    found = problems(answer)
    expected = {"training_file", "hyperparameters.n_epochs", "hyperparameters.nope", "metod", "suffix", "data.val_fraction"}
    assert expected <= set(found)
    assert "Did you mean 'method'" in found["metod"]
    assert answer.json()["error"]["param"] in found


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"seed": True}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"hyperparameters": {"n_epochs": "3"}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"ema": 1}}, "hyperparameters.ema"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}},
         "method.supervised.hyperparameters.n_epochs"),
        ({"method": {"type": "supervised", "supervised": {"beta": 1}}}, "method.supervised.beta"),
        ({"method": {"type": "supervised", "stages": 1}}, "method.stages"),
        ({"method": {"type": "dpo"}}, "method"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
          "hyperparameters": {"n_epochs": 3}}, "hyperparameters.n_epochs"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"model": {"backbone": "resnet18", "weights": "/etc/passwd"}}, "model.weights"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"a": "x\0y"}}, "metadata.a"),
        ({"metadata": {"a": "\x1b[31m"}}, "metadata.a"),
        ({"metadata": {"a\nb": "x"}}, "metadata.ab"),
        ({"data": {"name_encoding": "rot13"}}, "data.name_encoding"),
        ({"training_file": 3}, "training_file"),
        ({"training_file": ""}, "training_file"),
        ({"validation_file": "file-other"}, "validation_file"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(body: dict[str, Any], field: str, client: TestClient, file_id: str) -> None:
    assert field in problems(client.post(JOBS, json={"training_file": file_id, **body}))
    assert client.get(JOBS).json()["data"] == []


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"{", "application/json", 422),
        (b"[]", "application/json", 422),
        (b'{"seed": NaN}', "application/json", 422),
        (b'{"seed": 1, "seed": 2}', "application/json", 422),
        (b"\xff\xfe", "application/json", 422),
        (b'{"suffix": "\\ud800"}', "application/json", 422),
        (b"[" * 100_000, "application/json", 422),
        (b'{"training_file": "\\u0000/etc"}', "application/json", 422),
        (b"seed=1", "application/x-www-form-urlencoded", 415),
        (b'{"a": "' + b"x" * 2_000_000 + b'"}', "application/json", 413),
    ],
)
def test_a_body_that_is_no_request_is_refused(content: bytes, content_type: str, status: int, client: TestClient) -> None:
    answer = client.post(JOBS, content=content, headers={"content-type": content_type})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_folders_of_the_server_are_read_only_under_its_roots_and_the_rest_is_one_answer(
    client: TestClient, tmp_path: Path
) -> None:
    inside = write_classes(tmp_path / "data" / "birds", {"owl": 2, "wren": 2})
    write_classes(tmp_path / "secret", {"owl": 2, "wren": 2})
    (tmp_path / "data" / "link").symlink_to(tmp_path / "secret")
    assert create(client, str(inside))["suffix"] == "birds"
    told = set()
    for path in (
        tmp_path / "secret", tmp_path / "missing", tmp_path / "data" / "link", tmp_path / "data" / ".." / "secret",
        tmp_path / "data" / "missing", tmp_path / "data" / "birds" / "owl" / "0.png", Path("/proc/self/environ"), Path("/etc"),
    ):  # fmt: skip
        found = problems(client.post(JOBS, json={"training_file": str(path)}))
        told.add(found["training_file"].replace(repr(str(path)), "…"))
    assert len(told) == 1
    for uri in ("s3://key:secret@bucket/x", "http://169.254.169.254/", "file:///etc", "birds", "data/birds"):
        assert "is neither" in problems(client.post(JOBS, json={"training_file": uri}))["training_file"]


def test_a_dataset_that_cannot_be_trained_on_is_refused_now(client: TestClient, tmp_path: Path) -> None:
    write_classes(tmp_path / "data" / "birds", {"owl": 2})
    answer = client.post(JOBS, json={"training_file": str(tmp_path / "data" / "birds")})
    assert "only one class" in problems(answer)["training_file"]
    assert answer.json()["code"] == "invalid_data"


def test_the_same_key_and_body_give_the_same_job(client: TestClient, file_id: str) -> None:
    body, key = {"training_file": file_id, "seed": 3}, {"Idempotency-Key": "once"}
    first = client.post(JOBS, json=body, headers=key)
    again = client.post(JOBS, json=dict(reversed(body.items())), headers=key)
    assert again.json() == first.json()
    assert (first.status_code, again.status_code, again.headers["idempotent-replayed"]) == (201, 201, "true")
    other = client.post(JOBS, json={**body, "seed": 4}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "invalid_input")
    assert client.post(JOBS, json=body, headers={"Idempotency-Key": "x" * 256}).status_code == 422
    assert len(client.get(JOBS).json()["data"]) == 1


def test_jobs_beyond_the_quota_wait_outside(tmp_path: Path) -> None:
    with in_process(tmp_path, wait=False, max_unfinished_jobs=2, data_roots=(tmp_path,)) as client:
        folder = str(write_classes(tmp_path / "birds", {"owl": 2, "wren": 2}))
        made = [create(client, folder)["id"] for _ in range(2)]
        refused = client.post(JOBS, json={"training_file": folder})
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        client.post(f"{JOBS}/{made[0]}/cancel")
        create(client, folder)


# --- looking --------------------------------------------------------------------------------------


def test_jobs_are_listed_newest_first_by_page_and_state(client: TestClient, file_id: str) -> None:
    made = [create(client, file_id)["id"] for _ in range(3)]
    first = client.get(f"{JOBS}?limit=2").json()
    assert ([one["id"] for one in first["data"]], first["has_more"], first["last_id"]) == (made[:0:-1], True, made[1])
    assert [one["id"] for one in client.get(f"{JOBS}?after={first['last_id']}").json()["data"]] == made[:1]
    client.post(f"{JOBS}/{made[1]}/cancel")
    assert [one["id"] for one in client.get(f"{JOBS}?status=cancelled").json()["data"]] == [made[1]]
    assert [client.get(f"{JOBS}/{made[number]}").json()["queue_position"] for number in (0, 1, 2)] == [0, None, 1]
    assert client.get(f"{JOBS}?limit=0").status_code == 422


def test_a_running_job_shows_its_phase_progress_and_end(client: TestClient, file_id: str, tmp_path: Path) -> None:
    job_id = create(client, file_id)["id"]
    store, claim = claimed(tmp_path)
    progress = {"phase": "training", "done": 3, "total": 10, "unit": "steps", "values": {"eta_seconds": 60.0}, "message": ""}
    before = time.time()
    store.heartbeat(claim, phase="training", progress=progress)
    job = client.get(f"{JOBS}/{job_id}").json()
    after = time.time()
    assert (job["status"], job["phase"], job["progress"], job["attempts"]) == ("running", "training", progress, 1)
    assert before + 60 - 1 <= job["estimated_finish"] <= after + 60 + 1
    assert client.post(f"{JOBS}/{job_id}/cancel").json()["status"] == "cancelling"
    assert client.post(f"{JOBS}/{job_id}/cancel").json()["status"] == "cancelling"
    store.finish(claim, "cancelled")
    job = client.get(f"{JOBS}/{job_id}").json()
    assert (job["status"], job["phase"], job["progress"], job["estimated_finish"]) == ("cancelled", None, None, None)
    assert client.post(f"{JOBS}/{job_id}/cancel").status_code == 200


def test_a_succeeded_job_names_its_model_and_cannot_be_cancelled(client: TestClient, file_id: str, tmp_path: Path) -> None:
    job_id = create(client, file_id)["id"]
    store, claim = claimed(tmp_path)
    store.finish(claim, "succeeded", result={"model": "flowers", "version": "3", "metrics": {"val/top1": 0.9}, "run": "/x"})
    job = client.get(f"{JOBS}/{job_id}").json()
    assert (job["fine_tuned_model"], job["fine_tuned_version"], job["metrics"]) == ("flowers", "3", {"val/top1": 0.9})
    assert isinstance(job["finished_at"], int)
    refused = client.post(f"{JOBS}/{job_id}/cancel")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")


def test_a_failed_job_says_why_without_saying_where(client: TestClient, file_id: str, tmp_path: Path) -> None:
    job_id = create(client, file_id)["id"]
    store, claim = claimed(tmp_path)
    said = f"{tmp_path}/files/{file_id}/daisy: 9 images cannot be read"
    store.finish(claim, "failed", error_code="invalid_data", error_message=said)
    error = client.get(f"{JOBS}/{job_id}").json()["error"]
    message = f"files/{file_id}/daisy: 9 images cannot be read"
    assert error == {"code": "invalid_data", "message": message, "param": "training_file"}


def test_the_log_is_answered_as_text(client: TestClient, file_id: str, tmp_path: Path) -> None:
    job_id = create(client, file_id)["id"]
    assert client.get(f"{JOBS}/{job_id}/logs").text == ""
    log = tmp_path / "runs" / job_id / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"".join(b"line %d\n" % number for number in range(500)) + b"\xff\n")
    answer = client.get(f"{JOBS}/{job_id}/logs?tail=2")
    assert (answer.text, answer.headers["content-type"]) == ("line 499\n\ufffd\n", "text/plain; charset=utf-8")
    assert client.get(f"{JOBS}/{job_id}/logs").text.count("\n") == 501


def test_a_log_longer_than_an_answer_is_read_in_parts_to_the_byte(
    client: TestClient, file_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.routes.lifecycle.LARGEST_LOG_BYTES", 1000)
    job_id = create(client, file_id)["id"]
    log = tmp_path / "runs" / job_id / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_bytes(("zwölf\xff " * 350).encode("latin-1"))
    whole = b""
    while part := client.get(f"{JOBS}/{job_id}/logs", params={"offset": len(whole)}).content:
        assert len(part) <= 1000
        whole += part
    assert whole == log.read_bytes()
    assert client.get(f"{JOBS}/{job_id}/logs").content == whole[-1000:]
    assert client.get(f"{JOBS}/{job_id}/logs?offset=-1").status_code == 422


def test_checkpoints_are_those_that_are_whole(client: TestClient, file_id: str, tmp_path: Path) -> None:
    job_id = create(client, file_id)["id"]
    assert client.get(f"{JOBS}/{job_id}/checkpoints").json()["data"] == []
    run = tmp_path / "runs" / job_id
    (run / "checkpoints").mkdir(parents=True)
    for step in (10, 20, 30):
        (run / "checkpoints" / f"step-{step:08d}.pt").touch()
    for step in (10, 20):
        (run / "checkpoints" / f"step-{step:08d}.pt.sha256").touch()
    rows = [{"at": 1.0, "step": step, "epoch": None, "values": {"train/loss": 1 / step}} for step in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = client.get(f"{JOBS}/{job_id}/checkpoints?limit=1").json()
    assert (page["has_more"], page["data"][0]["step_number"]) == (True, 20)
    assert page["data"][0]["metrics"]["train_loss"] == 1 / 20
    rest = client.get(f"{JOBS}/{job_id}/checkpoints?after={page['last_id']}").json()["data"]
    assert [one["step_number"] for one in rest] == [10]
    assert client.get(f"{JOBS}/{job_id}/checkpoints?after=ftckpt-x").status_code == 404


def test_a_checkpoint_that_gives_way_to_newer_ones_while_they_are_listed_is_left_out(
    client: TestClient, file_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = create(client, file_id)["id"]
    folder = tmp_path / "runs" / job_id / "checkpoints"
    folder.mkdir(parents=True)
    for step in (10, 20):
        (folder / f"step-{step:08d}.pt.sha256").touch()

    def meanwhile(path: Path) -> int | None:
        (folder / "step-00000010.pt.sha256").unlink(missing_ok=True)
        return modified_ns(path)

    monkeypatch.setattr("service.schemas.jobs.modified_ns", meanwhile)
    assert [one["step_number"] for one in client.get(f"{JOBS}/{job_id}/checkpoints").json()["data"]] == [20]


@pytest.mark.parametrize("path", ["", "/events", "/checkpoints", "/logs"])
def test_an_unknown_job_is_not_found(path: str, client: TestClient) -> None:
    answer = client.get(f"{JOBS}/ftjob-nothing{path}")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


# --- events ---------------------------------------------------------------------------------------


def read_stream(client: Any, job_id: str, **headers: str) -> list[dict[str, str]]:
    """The frames of a whole stream."""
    answer = client.get(f"{JOBS}/{job_id}/events", headers={"accept": "text/event-stream", **headers})
    assert answer.headers["content-type"].startswith("text/event-stream")
    return frames(answer.text)


def frames(text: str) -> list[dict[str, str]]:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    return [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]


def finished_job(client: TestClient, file_id: str, home: Path, n_events: int) -> str:
    job_id = create(client, file_id)["id"]
    store, claim = claimed(home)
    records = [{"at": 1.0, "kind": "note", "message": f"line {number}", "level": "warning"} for number in range(n_events)]
    store.heartbeat(claim, records=records)
    store.finish(claim, "failed", error_code="stalled", error_message="It hung.")
    return str(job_id)


def test_events_come_newest_first_in_pages_or_oldest_first_when_asked(client: TestClient, file_id: str, tmp_path: Path) -> None:
    job_id = finished_job(client, file_id, tmp_path, 5)
    first = client.get(f"{JOBS}/{job_id}/events?limit=4").json()
    second = client.get(f"{JOBS}/{job_id}/events?limit=4&after={first['last_id']}").json()
    newest = [event["message"] for event in (*first["data"], *second["data"])]
    expected = ["The job is queued.", "Attempt 1 started.", *(f"line {number}" for number in range(5)), "It hung."]
    assert (newest, first["has_more"], second["has_more"]) == (expected[::-1], True, False)
    oldest = client.get(f"{JOBS}/{job_id}/events?limit=3&order=asc").json()
    assert [event["message"] for event in oldest["data"]] == expected[:3]
    rest = client.get(f"{JOBS}/{job_id}/events?order=asc&after={oldest['last_id']}").json()
    assert [event["message"] for event in rest["data"]] == expected[3:]
    event = oldest["data"][2]
    assert (event["object"], event["level"], event["type"], event["kind"]) == ("fine_tuning.job.event", "warn", "message", "note")


def test_a_stream_tells_everything_and_then_that_it_is_done(client: TestClient, file_id: str, tmp_path: Path) -> None:
    job_id = finished_job(client, file_id, tmp_path, 5)
    told = read_stream(client, job_id)
    listed = client.get(f"{JOBS}/{job_id}/events?order=asc").json()["data"]
    assert [json.loads(frame["data"]) for frame in told[:-1]] == listed
    assert [frame["id"] for frame in told[:-1]] == [event["id"] for event in listed]
    assert (told[-1]["event"], json.loads(told[-1]["data"])["status"]) == ("done", "failed")


def test_a_stream_goes_on_after_the_last_event_that_was_seen(client: TestClient, file_id: str, tmp_path: Path) -> None:
    job_id = finished_job(client, file_id, tmp_path, 5)
    whole = read_stream(client, job_id)
    for seen in (0, 3, len(whole) - 2):
        assert read_stream(client, job_id, **{"Last-Event-ID": whole[seen]["id"]}) == whole[seen + 1 :]
    bad = client.get(f"{JOBS}/{job_id}/events", headers={"accept": "text/event-stream", "Last-Event-ID": "nonsense"})
    assert bad.status_code == 404


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    registered(folder, write_bundle(folder / "bundle"))
    return folder


@pytest.fixture
def server(home: Path) -> Iterator[LiveServer]:
    with live_server(home) as server:
        yield server


def queued_job(home: Path, name: str) -> str:
    spec = {"training_file": "x", "model": {"backbone": "x"}, "method": {}, "hyperparameters": {}, "seed": 0, "metadata": {}}
    job, _ = JobStore(open_jobs(home)).create("local", spec, spec_digest="", suffix=name)
    return job.id


@pytest.mark.longer
def test_two_hundred_readers_see_every_event_and_the_server_still_stops_at_once(server: LiveServer, home: Path) -> None:
    readers = 200
    job_id = queued_job(home, "many")
    told: list[str] = [""] * readers
    ended = threading.Semaphore(0)

    def read(number: int) -> None:
        with httpx.stream("GET", f"{server.url}{JOBS}/{job_id}/events", headers=accept, timeout=END_SECONDS) as answer:
            for chunk in answer.iter_text():
                told[number] += chunk
        ended.release()

    accept = {"accept": "text/event-stream"}
    threads = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(readers)]
    for thread in threads:
        thread.start()
    until(lambda: all("is queued" in text for text in told))
    store, claim = claimed(home)
    store.heartbeat(claim, records=[{"at": 1.0, "kind": "note", "message": f"line {number}"} for number in range(20)])
    until(lambda: all("line 19" in text for text in told))
    assert httpx.get(f"{server.url}/readyz", timeout=END_SECONDS).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(timeout=END_SECONDS)
    for _ in range(readers):
        assert ended.acquire(timeout=END_SECONDS)
    assert b"graceful shutdown exceeded" not in server.log.read_bytes()  # no answer had to be cut off
    assert {len(frames(text)) for text in told} == {22}
    store.finish(claim, "cancelled")


def test_a_reader_comes_back_to_a_new_server_where_it_left(server: LiveServer, home: Path) -> None:
    job_id = queued_job(home, "again")
    store, claim = claimed(home)
    store.finish(claim, "cancelled")
    with httpx.Client(base_url=server.url, timeout=END_SECONDS) as client:
        whole = read_stream(client, job_id)
        assert read_stream(client, job_id, **{"Last-Event-ID": whole[1]["id"]}) == whole[2:]


# --- models ---------------------------------------------------------------------------------------


def test_a_model_that_a_worker_registers_is_served_by_name_at_once(tmp_path: Path) -> None:
    with in_process(tmp_path, wait=False) as client:
        assert client.post("/v1/models/colours/predict", content=picture()).status_code == 404
        registered(tmp_path, write_bundle(tmp_path / "bundle"))
        assert client.post("/v1/models/colours/predict", content=picture()).json()["predictions"][0]["label"] == "red"


def test_an_alias_moves_what_a_name_means_between_two_requests(tmp_path: Path) -> None:
    for version in (1, 2):
        registered(tmp_path, write_bundle(tmp_path / f"bundle-{version}", [f"v{version}-{one}" for one in "rgb"]))
    with in_process(tmp_path) as client:

        def label(reference: str) -> str:
            answer = client.post(f"/v1/models/{reference}/predict", content=picture())
            return str(answer.json()["predictions"][0]["label"])

        assert (label("colours"), label("colours@latest"), label("colours@2")) == ("v1-r", "v2-r", "v2-r")
        moved = client.put("/v1/models/colours/aliases/champion", json={"version": "latest", "force": True})
        assert {one["version"]: one["aliases"] for one in moved.json()["versions"]} == {"1": [], "2": ["champion", "latest"]}
        assert (label("colours"), label("colours@1")) == ("v2-r", "v1-r")
        assert client.put("/v1/models/colours/aliases/champion", json={"version": "9"}).status_code == 404
        assert client.put("/v1/models/colours/aliases/7", json={"version": "1"}).status_code == 422
        assert client.put("/v1/models/colours/aliases/champion", json={"version": "1", "x": 1}).status_code == 422


def test_an_alias_does_not_move_to_a_version_that_fails_its_checks(tmp_path: Path) -> None:
    for version in (1, 2):
        registered(tmp_path, write_bundle(tmp_path / f"bundle-{version}"))
    with in_process(tmp_path) as client:
        model = tmp_path / "models" / "colours" / "2" / "model.onnx"
        model.write_bytes(model.read_bytes()[:-1])
        refused = client.put("/v1/models/colours/aliases/champion", json={"version": "2"})
        assert (refused.status_code, refused.json()["code"]) == (409, "promotion_refused")
        assert client.post("/v1/models/colours/predict", content=picture()).json()["version"] == "1"


def test_a_model_is_deleted_whole_or_by_version(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        registered(tmp_path, write_bundle(tmp_path / f"bundle-{version}"))
    with in_process(tmp_path) as client:
        assert client.delete("/v1/models/colours@3").json() == {"id": "colours@3", "object": "model", "deleted": True}
        assert [one["version"] for one in client.get("/v1/models/colours").json()["versions"]] == ["2", "1"]
        for promoted in ("colours@1", "colours"):  # the champion, and the server's default
            refused = client.delete(f"/v1/models/{promoted}")
            assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
        registered(tmp_path, tmp_path / "bundle-1", "others")
        assert client.delete("/v1/models/others").status_code == 200
        assert client.delete("/v1/models/colours?force=true").status_code == 200
        for answer in (client.get("/v1/models/colours"), client.delete("/v1/models/colours")):
            assert answer.status_code == 404
