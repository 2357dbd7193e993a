"""Comparisons over HTTP: what is asked for, what is answered, and what is refused. They share their life cycle with jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from archives import photographs, zip_of
from folders import write_classes
from serving import in_process, live_server
from starlette.testclient import TestClient

from finetune.client import Client, JobFailed
from finetune.jobs.database import open_jobs
from finetune.jobs.job import Claim
from finetune.jobs.keys import KeyStore
from finetune.jobs.kinds import COMPARISON
from finetune.jobs.store import JobStore
from finetune.storage.files import write_json
from finetune.storage.rundir import RunDir

pytestmark = pytest.mark.usefixtures("uploads_read_here")

COMPARISONS, JOBS = "/v1/fine_tuning/comparisons", "/v1/fine_tuning/jobs"
FIGURE = {"value": 0.9, "low": 0.8, "high": 0.95, "n": 40, "sd": 0.01}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with in_process(tmp_path, wait=False, data_roots=(tmp_path / "data",)) as client:
        yield client


@pytest.fixture
def file_id(client: TestClient) -> str:
    return upload(client)


def upload(client: TestClient, headers: dict[str, str] | None = None) -> str:
    archive = ("Flowers.zip", zip_of(photographs()))
    answer = client.post("/v1/files", files={"file": archive}, data={"purpose": "fine-tune"}, headers=headers or {})
    return str(answer.json()["id"])


def create(client: TestClient, file_id: str, **body: Any) -> dict[str, Any]:
    answer = client.post(COMPARISONS, json={"training_file": file_id, **body})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def problems(answer: Any) -> dict[str, str]:
    assert answer.status_code == 422, answer.text
    return {one["field"]: one["detail"] for one in answer.json()["errors"]}


def claimed(home: Path) -> tuple[JobStore, Claim]:
    """A worker's side of the same database."""
    store = JobStore(open_jobs(home))
    claim = store.claim("worker")
    assert claim is not None
    return store, claim


def result_in(run: RunDir, **given: Any) -> dict[str, Any]:
    """A result as `finetune compare` writes it into a comparison's folder."""
    arms = [
        {"name": name, "runs": [str(run.child(f"{slug}-seed0").root)], "metrics": {"test/top1": FIGURE},
         "cost": {"train_seconds": 2.0}, "per_class_recall": [0.9, None], "note": ""}
        for name, slug in (("linear_probe", "linear-probe"), ("full", "full"))
    ]  # fmt: skip
    pair = {
        "a": "linear_probe", "b": "full", "metric": "test/top1", "difference": -0.1, "low": -0.2, "high": 0.0,
        "standard_error": 0.05, "degrees_of_freedom": None, "seed_share": 0.1, "p_value": 0.03, "p_exact": None,
        "p_adjusted": 0.03, "smallest_detectable": 0.12, "n": 40, "only_a": 1.0, "only_b": 5.0, "test": "mcnemar mid-p",
        "outcome": "better",
    }  # fmt: skip
    verdict = {"choose": "full", "outcome": "better", "sentence": "full is better.", "pareto": ["full"], "margin": 0.01}
    return {
        "object": "comparison", "id": run.name, "dataset": "photos", "split": "test", "classes": ["a", "b"],
        "headline": "test/top1", "arms": arms, "pairs": [pair], "verdict": verdict, "left_out": 0,
        "cost": {"wall_seconds": 9.0}, "registered": "flowers@3", "report": str(run.report), "mlflow_run_id": None, **given,
    }  # fmt: skip


def finished(home: Path, comparison_id: str, **given: Any) -> RunDir:
    """Carry a queued comparison out as a worker would, without training."""
    store, claim = claimed(home)
    assert claim.job.id == comparison_id
    run = RunDir(home / "runs" / comparison_id).create()
    result = result_in(run, **given)
    store.finish(claim, "succeeded", message=COMPARISON.conclude(result), result=result)
    return run


# --- creating -------------------------------------------------------------------------------------


def test_a_comparison_is_answered_with_every_arm_by_what_it_changes(client: TestClient, file_id: str, tmp_path: Path) -> None:
    body = {
        "training_file": file_id, "methods": ["linear_probe", "full"], "models": ["tf_efficientnet_lite0"], "seeds": 2,
        "arms": [{"name": "light", "set": {"augmentation": "light", "method": "full"}}], "metadata": {"team": "garden"},
    }  # fmt: skip
    answer = client.post(COMPARISONS, json=body)
    made = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (201, f"{COMPARISONS}/{made['id']}")
    assert made["id"].startswith("ftcmp-")
    expected = {
        "object": "fine_tuning.comparison", "status": "queued", "queue_position": 0, "attempts": 0, "seeds": 2, "runs": None,
        "margin": 0.01, "budget_seconds": None, "register_chosen": True, "training_file": file_id, "suffix": "flowers",
        "metadata": {"team": "garden"}, "verdict": None, "fine_tuned_model": None, "error": None, "result_files": [],
        "organization_id": "local", "description": "tf_efficientnet_lite0 linear_probe, tf_efficientnet_lite0 full, light",
    }  # fmt: skip
    assert expected.items() <= made.items()
    default = "tf_efficientnet_lite0"
    assert made["arms"] == [
        {"name": f"{default} linear_probe", "set": {"method": "linear_probe", "model.backbone": default}},
        {"name": f"{default} full", "set": {"method": "full", "model.backbone": default}},
        {"name": "light", "set": {"augmentation": "light", "method": "full"}},
    ]
    assert client.get(f"{COMPARISONS}/{made['id']}").json() == made
    stored = JobStore(open_jobs(tmp_path)).get(made["id"])
    assert (stored.kind, stored.suffix, stored.request) == (COMPARISON, "flowers", body)
    assert stored.spec["training_file"] == str(tmp_path / "files" / file_id)
    assert stored.spec["suffix"] == "flowers"


def test_without_arms_the_three_methods_are_compared_and_nulls_mean_nothing_given(client: TestClient, file_id: str) -> None:
    nulls = dict.fromkeys(("methods", "models", "arms", "seeds", "margin", "budget_seconds", "register_chosen", "runs", "seed"))
    for body in ({}, nulls):
        made = create(client, file_id, **body)
        assert [arm["name"] for arm in made["arms"]] == ["linear_probe", "partial", "full"]
        assert (made["seeds"], made["register_chosen"]) == (3, True)
    assert create(client, file_id, register_chosen=False)["suffix"] is None


def test_every_problem_of_every_arm_is_told_at_once_with_its_path(client: TestClient, tmp_path: Path) -> None:
    arms = [
        {"name": "one", "set": {"hyperparameters.n_epochs": 0, "training_file": "/etc", "suffix": "theirs"}},
        {"name": "two", "set": {"nope": 1}},
    ]
    body = {"training_file": "file-nothing", "arms": arms, "seeds": 0, "data": {"val_fraction": 2}, "margin": "0.1"}
    found = problems(client.post(COMPARISONS, json=body))
    assert {"training_file", "seeds", "data.val_fraction"} <= set(found)
    body |= {"seeds": 1, "data": {}, "margin": 0.1}
    found = problems(client.post(COMPARISONS, json=body))
    expected = {
        "training_file", "arms[0].set.hyperparameters.n_epochs", "arms[0].set.training_file", "arms[0].set.suffix",
        "arms[1].set.nope",
    }  # fmt: skip
    assert expected <= set(found)
    assert "all arms share this" in found["arms[0].set.training_file"]
    assert client.get(COMPARISONS).json()["data"] == []


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"seeds": "3"}, "seeds"),
        ({"methods": ["probe", "full"]}, "methods[0]"),
        ({"methods": ["full"]}, "arms"),
        ({"seeds": 50, "arms": [{"name": str(number)} for number in range(20)]}, "seeds"),
        ({"seeds": 30, "data": {"folds": 10}}, "seeds"),
        ({"arms": [{"name": "a"}, {"name": "b", "set": {"model.weights": "/etc/passwd"}}]}, "arms[1].set.model.weights"),
        ({"model": {"weights": "/etc/passwd"}}, "model.weights"),
        ({"arms": [{"name": "a"}, {"name": "b", "set": {"compute.threads": 1024}}]}, "arms[1].set.compute.threads"),
        ({"data": {"test_fraction": 0}}, "data.test_fraction"),
        ({"metadata": {"a": "x" * 600}}, "metadata.a"),
        ({"runs": ["ftjob-a", "ftjob-b"]}, "training_file"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(body: dict[str, Any], field: str, client: TestClient, file_id: str) -> None:
    assert field in problems(client.post(COMPARISONS, json={"training_file": file_id, **body}))
    assert client.get(COMPARISONS).json()["data"] == []


@pytest.mark.usefixtures("known_backbones")
def test_names_that_only_the_training_libraries_know_are_checked_for_every_arm(client: TestClient, file_id: str) -> None:
    asked = {"training_file": file_id, "models": ["resnet18", "resnet19"], "methods": ["linear_probe"]}
    found = problems(client.post(COMPARISONS, json=asked))
    assert set(found) == {"methods[0]"}
    assert "arm 'resnet19 linear_probe': model.backbone" in found["methods[0]"]
    shared = problems(client.post(COMPARISONS, json={"training_file": file_id, "model": "resnet19"}))
    assert set(shared) == {"model.backbone"}, "once, not once for each arm"


def test_the_same_key_and_body_give_the_same_comparison_and_no_job(client: TestClient, file_id: str) -> None:
    body, key = {"training_file": file_id, "seeds": 2}, {"Idempotency-Key": "once"}
    first, again = (client.post(COMPARISONS, json=body, headers=key) for _ in range(2))
    assert again.json() == first.json()
    assert (first.status_code, again.status_code, again.headers["idempotent-replayed"]) == (201, 201, "true")
    assert client.post(COMPARISONS, json={**body, "seeds": 3}, headers=key).status_code == 422
    plain, other = {"training_file": file_id}, {"Idempotency-Key": "other"}
    assert client.post(COMPARISONS, json=plain, headers=other).status_code == 201
    assert client.post(JOBS, json=plain, headers=other).status_code == 422, "another request, although the same words"
    assert len(client.get(COMPARISONS).json()["data"]) == 2


def test_comparisons_and_jobs_share_quota_and_queue_but_not_their_routes(tmp_path: Path) -> None:
    with in_process(tmp_path, wait=False, max_unfinished_jobs=2, data_roots=(tmp_path,)) as client:
        folder = str(write_classes(tmp_path / "birds", {"owl": 2, "wren": 2}))
        job = client.post(JOBS, json={"training_file": folder}).json()
        made = create(client, folder)
        assert (job["queue_position"], made["queue_position"]) == (0, 1)
        assert client.post(COMPARISONS, json={"training_file": folder}).json()["code"] == "queue_full"
        assert [one["id"] for one in client.get(JOBS).json()["data"]] == [job["id"]]
        assert [one["id"] for one in client.get(COMPARISONS).json()["data"]] == [made["id"]]
        for path in ("", "/events", "/logs", "/result"):
            assert client.get(f"{JOBS}/{made['id']}{path}").status_code == 404
            assert client.get(f"{COMPARISONS}/{job['id']}{path}").status_code == 404
        assert client.post(f"{JOBS}/{made['id']}/cancel").status_code == 404
        store = JobStore(open_jobs(tmp_path))
        claims = [store.claim("worker") for _ in range(2)]
        assert [claim.job.id for claim in claims if claim] == [job["id"], made["id"]], "in the order in which they were made"


# --- living ---------------------------------------------------------------------------------------


def test_a_comparison_is_followed_cancelled_and_deleted(client: TestClient, file_id: str, tmp_path: Path) -> None:
    made = create(client, file_id)["id"]
    store, claim = claimed(tmp_path)
    progress = {"phase": "runs", "done": 1, "total": 9, "unit": "runs", "values": {}, "message": ""}
    store.heartbeat(claim, phase="runs", progress=progress, records=[{"at": 1.0, "kind": "child_finished", "message": "one"}])
    running = client.get(f"{COMPARISONS}/{made}").json()
    assert (running["status"], running["phase"], running["progress"]) == ("running", "runs", progress)
    assert client.delete(f"{COMPARISONS}/{made}").status_code == 409
    assert client.post(f"{COMPARISONS}/{made}/cancel").json()["status"] == "cancelling"
    store.finish(claim, "cancelled")
    events = client.get(f"{COMPARISONS}/{made}/events?order=asc").json()["data"]
    assert [event["kind"] for event in events] == ["queued", "running", "child_finished", "cancelling", "cancelled"]
    stream = client.get(f"{COMPARISONS}/{made}/events", headers={"Accept": "text/event-stream"}).text
    assert "event: done" in stream
    assert client.get(f"{COMPARISONS}/{made}/result").status_code == 409
    run = RunDir(tmp_path / "runs" / made).create()
    assert client.delete(f"{COMPARISONS}/{made}").json() == {
        "id": made, "object": "fine_tuning.comparison", "deleted": True,
    }  # fmt: skip
    assert not run.root.exists()
    assert client.get(f"{COMPARISONS}/{made}").status_code == 404


def test_a_result_is_the_document_of_the_command_line_with_paths_of_this_server(
    client: TestClient, file_id: str, tmp_path: Path
) -> None:
    made = create(client, file_id)["id"]
    run = finished(tmp_path, made, dataset=file_id)
    run.report.write_text(f"<title>{file_id}</title><code>{run.child('full-seed0').root}</code>")
    document = client.get(f"{COMPARISONS}/{made}").json()
    assert document["verdict"] == result_in(run)["verdict"]
    assert (document["fine_tuned_model"], document["fine_tuned_version"]) == ("flowers", "3")
    assert document["result_files"] == [f"{COMPARISONS}/{made}/result", f"{COMPARISONS}/{made}/report"]
    result = client.get(f"{COMPARISONS}/{made}/result").json()
    assert result["arms"][1]["runs"] == [f"{COMPARISONS}/{made}/runs/full-seed0"]
    assert (result["report"], result["dataset"]) == (f"{COMPARISONS}/{made}/report", "Flowers")
    same = ("object", "id", "split", "classes", "headline", "pairs", "verdict", "left_out", "cost", "registered")
    assert {name: result[name] for name in same} == {name: result_in(run)[name] for name in same}
    page = client.get(f"{COMPARISONS}/{made}/report")
    assert page.text == f"<title>Flowers</title><code>runs/{made}/runs/full-seed0</code>"
    assert page.headers["content-security-policy"].startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "sandbox" in page.headers["content-security-policy"]
    assert client.get(f"{COMPARISONS}/{made}/events").json()["data"][0]["message"] == "full is better."
    (model,) = [one for one in client.get("/v1/models").json()["data"] if one["id"] == "flowers"] or [None]
    assert model is None, "nothing was registered in this test"


def test_the_runs_of_a_comparison_are_listed_while_it_goes_on(client: TestClient, file_id: str, tmp_path: Path) -> None:
    made = create(client, file_id, methods=["linear_probe", "full"], seeds=2, seed=7)["id"]
    study = RunDir(tmp_path / "runs" / made)
    done, begun = study.child("linear-probe-seed0").create(), study.child("full-seed0").create()
    outcome = {
        "metrics": {"test/top1": 0.9},
        "cost": {"train_seconds": 2.0},
        "classes": ["a", "b"],
        "warnings": [f"{study.root}"],
    }
    write_json(done.outcome, outcome)
    write_json(done.evaluation, {"splits": {"test": {"n": 40}}})
    done.report.write_text("<p>report</p>")
    runs = client.get(f"{COMPARISONS}/{made}/runs").json()["data"]
    assert [(run["name"], run["arm"], run["seed"], run["status"]) for run in runs] == [
        ("linear-probe-seed0", "linear_probe", 7, "finished"),
        ("full-seed0", "full", 7, "begun"),
        ("linear-probe-seed1", "linear_probe", 8, "waiting"),
        ("full-seed1", "full", 8, "waiting"),
    ]
    place = f"{COMPARISONS}/{made}/runs/linear-probe-seed0"
    assert runs[0]["links"] == {"run": place, "report": f"{place}/report"}
    one = client.get(place).json()
    assert (one["metrics"], one["splits"], one["warnings"]) == ({"test/top1": 0.9}, {"test": {"n": 40}}, [f"runs/{made}"])
    assert client.get(f"{place}/report").text == "<p>report</p>"
    assert client.get(f"{COMPARISONS}/{made}/runs/{begun.name}").status_code == 409
    for name in ("nothing", "%2e%2e", "%2e%2e%2f%2e%2e", "full-seed9", "full-seed0%00"):
        assert client.get(f"{COMPARISONS}/{made}/runs/{name}").status_code == 404, name
    client.post(f"{COMPARISONS}/{made}/cancel")
    assert client.get(f"{COMPARISONS}/{made}/runs").json()["data"][3]["status"] == "left_out"


# --- runs that exist ------------------------------------------------------------------------------


def finished_job(client: TestClient, home: Path, file_id: str, *, tested: bool = True, classes: str = "ab", **body: Any) -> str:
    job_id = str(client.post(JOBS, json={"training_file": file_id, **body}).json()["id"])
    store, claim = claimed(home)
    run = RunDir(home / "runs" / job_id).create()
    if tested:
        run.predictions.mkdir()
        run.predictions_of("test").touch()
    store.finish(claim, "succeeded", result={"model": "flowers", "version": "1", "classes": list(classes), "metrics": {}})
    return job_id


def test_jobs_that_exist_are_compared_by_their_ids(client: TestClient, file_id: str, tmp_path: Path) -> None:
    first = finished_job(client, tmp_path, file_id)
    second = finished_job(client, tmp_path, file_id, method="full")
    made = client.post(COMPARISONS, json={"runs": [first, second], "margin": 0.02, "metadata": None}).json()
    assert (made["runs"], made["margin"], made["arms"], made["register_chosen"]) == ([first, second], 0.02, [], False)
    assert (made["description"], made["training_file"], made["suffix"]) == ("2 runs", None, None)
    stored = JobStore(open_jobs(tmp_path)).get(made["id"])
    assert stored.spec["runs"] == [str(tmp_path / "runs" / job_id) for job_id in (first, second)]
    assert client.get(f"{COMPARISONS}/{made['id']}/runs").json()["data"] == []
    refused = client.delete(f"{JOBS}/{first}")
    assert (refused.status_code, made["id"] in refused.json()["detail"]) == (409, True)
    run = finished(tmp_path, made["id"])
    result = result_in(run)
    assert client.get(f"{COMPARISONS}/{made['id']}/result").json()["verdict"] == result["verdict"]
    assert client.delete(f"{JOBS}/{first}").status_code == 200


def test_jobs_that_cannot_be_compared_are_named(client: TestClient, file_id: str, tmp_path: Path) -> None:
    first, other = finished_job(client, tmp_path, file_id), finished_job(client, tmp_path, file_id, seed=1)
    untested = finished_job(client, tmp_path, file_id, tested=False, method="full")
    strange = finished_job(client, tmp_path, file_id, classes="xy", method="full")
    queued = client.post(JOBS, json={"training_file": file_id, "method": "full"}).json()["id"]
    runs = [first, untested, strange, queued, first, "ftjob-none", str(tmp_path)]
    found = problems(client.post(COMPARISONS, json={"runs": runs}))
    assert set(found) == {f"runs[{number}]" for number in range(1, 7)}
    said = ["no test images", "other classes", "is queued", "named twice", "not the id of a fine-tuning job", "not the id"]
    assert all(text in found[f"runs[{number}]"] for number, text in enumerate(said, 1))
    assert "differ in the seed alone" in problems(client.post(COMPARISONS, json={"runs": [first, other]}))["runs"]
    assert "at least 2" in problems(client.post(COMPARISONS, json={"runs": [first]}))["runs"]
    assert "unknown key" in problems(client.post(COMPARISONS, json={"runs": [first, untested], "seeds": 2}))["seeds"]


def test_an_unknown_key_of_an_arm_says_what_an_arm_takes(client: TestClient, file_id: str) -> None:
    arms = [{"name": "a", "model": "resnet18"}, {"name": "b", "set": {"method": "full"}}]
    found = problems(client.post(COMPARISONS, json={"training_file": file_id, "arms": arms}))
    said = (
        'unknown key; allowed are name, set, as in {"name": "wide", "set": {"model": "resnet50", "hyperparameters.n_epochs": 5}}'
    )
    assert found == {"arms[0].model": said}


# --- owners ---------------------------------------------------------------------------------------


def test_what_another_owner_has_does_not_exist(client: TestClient, tmp_path: Path) -> None:
    keys = KeyStore(open_jobs(tmp_path))
    ann, bob, root = ({"Authorization": f"Bearer {keys.create(who, [scope])[0]}"} for who, scope in
                      (("ann", "jobs"), ("bob", "jobs"), ("root", "admin")))  # fmt: skip
    hers = upload(client, ann)
    made = client.post(COMPARISONS, json={"training_file": hers}, headers=ann).json()["id"]
    expected = {
        ("GET", ""): 200, ("DELETE", ""): 409, ("GET", "/events"): 200, ("GET", "/logs"): 200, ("GET", "/result"): 409,
        ("GET", "/report"): 409, ("GET", "/runs"): 200, ("GET", "/runs/full-seed0"): 409, ("GET", "/runs/full-seed0/report"): 404,
        ("POST", "/cancel"): 200,
    }  # fmt: skip
    for (method, path), status in expected.items():
        answers = [client.request(method, f"{COMPARISONS}/{made}{path}", headers=key).status_code for key in (bob, root)]
        assert answers == [404, status], path
    assert client.get(COMPARISONS, headers=bob).json()["data"] == []
    assert "is neither" in problems(client.post(COMPARISONS, json={"training_file": hers}, headers=bob))["training_file"]
    taken = client.post(COMPARISONS, json={"training_file": upload(client, bob), "suffix": "flowers"}, headers=bob)
    assert taken.status_code == 201, "hers was cancelled before it made a model"


# --- the client -----------------------------------------------------------------------------------


def test_our_client_compares(tmp_path: Path) -> None:
    with live_server(tmp_path, ready=False) as server, Client(server.url) as ours:
        drive(ours, tmp_path)


def drive(ours: Client, tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(zip_of(photographs()))
    file_id = ours.upload(tmp_path / "photos.zip")
    made = ours.create_comparison(file_id, methods=["linear_probe", "full"], idempotency_key="k")
    assert ours.create_comparison(file_id, methods=["linear_probe", "full"], idempotency_key="k")["id"] == made["id"]
    assert [one["id"] for one in ours.comparisons(status="queued")] == [made["id"]]
    finished(tmp_path, made["id"])
    assert ours.wait(made["id"])["verdict"]["choose"] == "full"
    assert ours.result(made["id"])["pairs"][0]["p_value"] == 0.03
    assert [event["kind"] for event in ours.events(made["id"])] == ["queued", "running", "succeeded"]
    assert len(ours.runs(made["id"])) == 6
    RunDir(tmp_path / "runs" / made["id"]).report.write_text("<p>page</p>")
    assert ours.report(made["id"]) == "<p>page</p>"
    ours.delete_job(made["id"])
    other = ours.create_comparison(file_id)
    ours.cancel(other["id"])
    with pytest.raises(JobFailed, match="cancelled"):
        ours.wait(other["id"])
