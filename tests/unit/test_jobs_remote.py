"""Jobs on a server, seen from the client's side: what is sent, what is made of the answers, what is tried again."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from finetune.batch_spec import BatchSpec
from finetune.comparison_spec import parse_request
from finetune.errors import InvalidInput
from finetune.jobs import remote
from finetune.jobs.http import RequestRefused, ServerUnreachable
from finetune.jobs.remote import RemoteJobs
from finetune.progress import Progress
from finetune.spec import parse_spec

JOB = {
    "id": "ftjob-1", "object": "fine_tuning.job", "created_at": 1000, "started_at": 1001, "finished_at": None,
    "status": "running", "phase": "training",
    "progress": {"phase": "training", "done": 1, "total": 2, "unit": "steps", "values": {"loss": None}},
    "attempts": 2, "model": "resnet18", "fine_tuned_model": None, "fine_tuned_version": None, "method": {"type": "full"},
    "metrics": {}, "error": None,
}  # fmt: skip
DONE = {**JOB, "status": "succeeded", "finished_at": 1009, "fine_tuned_model": "flowers", "fine_tuned_version": "3"}
COMPARED = {
    **{key: JOB[key] for key in ("created_at", "started_at", "finished_at", "attempts", "error")}, "id": "ftcmp-1",
    "object": "fine_tuning.comparison", "status": "succeeded", "phase": None, "progress": None, "fine_tuned_model": "flowers",
    "fine_tuned_version": "3", "description": "linear_probe, full", "verdict": {"sentence": "full is better."},
}  # fmt: skip
ANSWERED = {
    **{key: COMPARED[key] for key in ("created_at", "started_at", "finished_at", "attempts", "error", "phase", "progress")},
    "id": "batch-1", "object": "batch_prediction", "status": "succeeded", "description": "images predicted by flowers@3",
    "conclusion": "3 images answered.", "model": "flowers@3",
}  # fmt: skip
PROBLEM = {
    "code": "invalid_spec", "detail": "the job spec has 2 problems",
    "errors": [{"field": "method.stages", "detail": "must be at least 1"}, {"field": "seed", "detail": "must be a number"}],
}  # fmt: skip

Answer = Callable[[httpx.Request], httpx.Response]


class Server:
    """Answers each request with the next of `answers`, and remembers what was asked."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self, key: str | None = "ft_abc") -> RemoteJobs:
        return RemoteJobs("http://server:1234/", key, httpx.MockTransport(self))


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr("finetune.jobs.http.time", SimpleNamespace(sleep=taken.append))
    return taken


def ok(document: Any) -> httpx.Response:
    return httpx.Response(200, json=document)


def test_a_job_document_becomes_a_view() -> None:
    job = Server(ok(DONE)).client().get("ftjob-1")
    assert (job.state, job.model, job.backbone, job.method, job.attempts) == ("succeeded", "flowers@3", "resnet18", "full", 2)
    assert (job.created_at, job.finished_at, job.finished) == (1000, 1009, True)
    running = Server(ok(JOB)).client().get("ftjob-1")
    assert (running.phase, running.progress, running.model) == ("training", JOB["progress"], None)
    failed = (
        Server(ok({**JOB, "status": "failed", "error": {"code": "crash_loop", "message": "it died"}})).client().get("ftjob-1")
    )
    assert (failed.error_code, failed.error_message) == ("crash_loop", "it died")


def test_a_comparison_has_an_address_of_its_own_and_its_verdict_in_the_view() -> None:
    server = Server(ok(COMPARED), ok({"object": "comparison"}))
    job = server.client().get("ftcmp-1")
    assert (job.kind, job.what, job.conclusion, job.model) == ("comparison", "linear_probe, full", "full is better.", "flowers@3")
    assert (job.backbone, job.method, job.metrics) == (None, None, {})
    assert server.client().result("ftcmp-1") == {"object": "comparison"}
    paths = [request.url.path for request in server.asked]
    assert paths == ["/v1/fine_tuning/comparisons/ftcmp-1", "/v1/fine_tuning/comparisons/ftcmp-1/result"]


def test_images_to_be_answered_go_up_for_that_purpose_and_the_answers_come_down(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(b"an archive")
    server = Server(ok({"id": "file-a"}), ok(ANSWERED), httpx.Response(200, content=b"file\n"), httpx.Response(404, json={}))
    client = server.client()
    job = client.submit(BatchSpec(input_file=str(tmp_path / "photos.zip"), model="flowers"), "my-key")
    assert (job.kind, job.conclusion, job.what) == ("batch", "3 images answered.", "images predicted by flowers@3")
    sent, created = server.asked
    assert b'name="purpose"\r\n\r\nbatch' in sent.content
    assert (created.url.path, json.loads(created.content)) == (
        "/v1/batch_predictions", {"input_file": "file-a", "model": "flowers"},
    )  # fmt: skip
    client.download_answers("batch-1", "csv", tmp_path / "answers.csv")
    assert (tmp_path / "answers.csv").read_bytes() == b"file\n"
    assert str(server.asked[-1].url).endswith("/v1/batch_predictions/batch-1/answers?format=csv")
    with pytest.raises(RequestRefused):
        client.download_answers("batch-1", "npz", tmp_path / "answers.npz")
    assert not (tmp_path / "answers.npz").exists()


def test_of_a_comparison_only_what_was_given_is_sent_and_its_data_goes_up_once(tmp_path: Path) -> None:
    archive = tmp_path / "photos.zip"
    archive.write_bytes(b"an archive")
    asked = {"training_file": str(archive), "methods": ["linear_probe", "full"], "seeds": 2, "data": {"test_fraction": 0.2}}
    server = Server(ok({"id": "file-a"}), ok(COMPARED), ok(COMPARED))
    server.client().submit(parse_request(asked), "my-key")
    _, created = server.asked
    assert (created.url.path, created.headers["Idempotency-Key"]) == ("/v1/fine_tuning/comparisons", "my-key")
    assert json.loads(created.content) == {**asked, "training_file": "file-a"}
    server.client().submit(parse_request({"runs": ["ftjob-1", "ftjob-2"]}))
    assert json.loads(server.asked[-1].content) == {"runs": ["ftjob-1", "ftjob-2"]}


def test_the_key_goes_along_and_only_what_was_given_is_sent() -> None:
    server = Server(ok(JOB))
    spec = parse_spec({"training_file": "file-7", "method": "full", "hyperparameters": {"n_epochs": 3}})
    server.client().submit(spec, "my-key")
    (request,) = server.asked
    assert (request.method, request.url.path) == ("POST", "/v1/fine_tuning/jobs")
    assert request.headers["Authorization"] == "Bearer ft_abc"
    assert request.headers["Idempotency-Key"] == "my-key"
    assert json.loads(request.content) == {
        "training_file": "file-7", "method": {"type": "full"}, "hyperparameters": {"n_epochs": 3},
    }  # fmt: skip


def test_a_submission_is_sent_again_with_the_same_key_until_it_is_answered(pauses: list[float]) -> None:
    later = httpx.Response(503, headers={"Retry-After": "7"})
    server = Server(httpx.ConnectError("refused"), later, httpx.ReadTimeout("nothing"), ok(JOB))
    assert server.client(None).submit(parse_spec({"training_file": "file-7"})).id == "ftjob-1"
    assert len({request.headers["Idempotency-Key"] for request in server.asked}) == 1
    assert "Authorization" not in server.asked[0].headers
    assert pauses == [0.5, 7.0, 14.0]


def test_a_server_that_never_answers_is_named() -> None:
    server = Server(*[httpx.ConnectError("refused")] * 4)
    with pytest.raises(ServerUnreachable, match=r"http://server:1234: no answer \(refused\)\. Check the address"):
        server.client().get("ftjob-1")


def test_what_the_server_refuses_is_said_in_its_words_with_every_field() -> None:
    with pytest.raises(RequestRefused, match="422 invalid_spec: the job spec has 2 problems") as caught:
        Server(httpx.Response(422, json=PROBLEM)).client().submit(parse_spec({"training_file": "file-7"}))
    assert [str(problem) for problem in caught.value.problems] == ["method.stages: must be at least 1", "seed: must be a number"]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (httpx.Response(500, text="<html>proxy</html>"), ServerUnreachable),
        (httpx.Response(404, json=["not", "ours"]), RequestRefused),
        (httpx.Response(401, json={"code": "unauthorized", "detail": "needs a key"}), RequestRefused),
    ],
)
def test_an_answer_in_another_form_is_still_an_error(answer: httpx.Response, expected: type[Exception]) -> None:
    with pytest.raises(expected, match=str(answer.status_code)):
        Server(answer).client().get("ftjob-1")


def test_a_folder_is_packed_and_uploaded_before_the_job_is_made(tmp_path: Path) -> None:
    for name in ("train/daisy/1.jpg", "train/rose/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "train" / "link").symlink_to("/etc")
    validation = tmp_path / "validation.zip"
    validation.write_bytes(b"an archive already")
    server = Server(ok({"id": "file-a"}), ok({"id": "file-b"}), ok(JOB))
    seen: list[Progress] = []
    spec = parse_spec({"training_file": str(tmp_path / "train"), "validation_file": str(validation)})
    server.client().submit(spec, progress=seen.append)
    packed, as_it_is, created = server.asked
    assert (packed.url.path, as_it_is.url.path) == ("/v1/files", "/v1/files")
    assert b'filename="train.tar"' in packed.content
    assert b'name="purpose"\r\n\r\nfine-tune' in packed.content
    start = packed.content.index(b"daisy/1.jpg")
    with tarfile.open(fileobj=io.BytesIO(packed.content[start:])) as archive:
        assert {member.name: archive.extractfile(member).read() for member in archive} == {  # type: ignore[union-attr]
            "daisy/1.jpg": b"train/daisy/1.jpg", "rose/2.jpg": b"train/rose/2.jpg",
        }  # fmt: skip
    assert b"an archive already" in as_it_is.content
    assert json.loads(created.content) == {"training_file": "file-a", "validation_file": "file-b"}
    assert {progress.message for progress in seen} == {"packing", "uploading"}
    assert all(progress.done <= progress.total for progress in seen)


def test_an_empty_folder_is_not_sent(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no file in this folder"):
        Server().client().submit(parse_spec({"training_file": str(tmp_path)}))


def test_lists_of_every_kind_are_read_page_by_page_and_merged_by_age(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PAGE", 2)
    jobs = [
        {"data": [{**JOB, "id": f"ftjob-{n}", "created_at": n} for n in numbers], "has_more": True} for numbers in ([9, 7], [5])
    ]
    comparisons = {"data": [{**COMPARED, "id": f"ftcmp-{n}", "created_at": n} for n in (8, 1)], "has_more": False}
    batches = {"data": [{**ANSWERED, "created_at": 6}], "has_more": False}
    checks: dict[str, Any] = {"data": [], "has_more": False}
    server = Server(*map(ok, [*jobs, comparisons, batches, checks]))
    assert [job.id for job in server.client().list(3)] == ["ftjob-9", "ftcmp-8", "ftjob-7"]
    asked = [(request.url.path.rpartition("/")[2], dict(request.url.params)) for request in server.asked]
    assert asked == [
        ("jobs", {"limit": "2"}),
        ("jobs", {"limit": "1", "after": "ftjob-7"}),
        ("comparisons", {"limit": "2"}),
        ("batch_predictions", {"limit": "2"}),
        ("checks", {"limit": "2"}),
    ]


def test_events_are_read_from_the_last_one_that_is_known() -> None:
    def event(seq: int) -> dict[str, Any]:
        return {"id": f"ftevent-{seq}", "created_at": 1000 + seq, "level": "warn", "message": f"m{seq}"}

    server = Server(ok({"data": [event(5), event(8)], "has_more": True}), ok({"data": [event(9)], "has_more": False}))
    assert [(found.seq, found.message) for found in server.client().events("ftjob-1", 4)] == [(5, "m5"), (8, "m8"), (9, "m9")]
    assert [request.url.params["after"] for request in server.asked] == ["ftevent-4", "ftevent-8"]
    assert {request.url.params["order"] for request in server.asked} == {"asc"}


def test_a_log_is_read_on_from_where_it_was_read_to_until_there_is_no_more() -> None:
    server = Server(*(httpx.Response(200, content=part) for part in (b"\xc3", b"\xb6lf", b"")))
    assert server.client().log("ftjob-1", 2) == "ölf".encode()
    assert {request.url.path for request in server.asked} == {"/v1/fine_tuning/jobs/ftjob-1/logs"}
    assert [request.url.params["offset"] for request in server.asked] == ["2", "3", "6"]


def test_cancelling_is_asked_for() -> None:
    server = Server(ok({**JOB, "status": "cancelling"}))
    assert server.client().cancel("ftjob-1").state == "cancelling"
    assert (server.asked[0].method, server.asked[0].url.path) == ("POST", "/v1/fine_tuning/jobs/ftjob-1/cancel")


def test_an_id_cannot_lead_elsewhere() -> None:
    server = Server(httpx.Response(404, json={}))
    with pytest.raises(RequestRefused):
        server.client().get("../../files?x=1#y")
    assert server.asked[0].url.raw_path == b"/v1/fine_tuning/jobs/..%2F..%2Ffiles%3Fx%3D1%23y"
