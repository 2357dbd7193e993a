"""What only the training libraries know of a job: asked of a child process before the job is accepted. Here it is a stand-in."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from archives import photographs, zip_of
from serving import in_process, until
from starlette.testclient import TestClient

from finetune.jobs.database import open_jobs
from finetune.jobs.keys import KeyStore
from finetune.spec import DEFAULT_BACKBONE
from service import spec_check
from service.child import ChildProgram
from service.settings import ServerSettings

pytestmark = pytest.mark.usefixtures("uploads_read_here")

JOBS, COMPARISONS = "/v1/fine_tuning/jobs", "/v1/fine_tuning/comparisons"


class StandIn:
    """Answers as the child process does, that every spec is good; `asked` is the backbones of each call."""

    def __init__(self, catalogue: Sequence[str] = ()) -> None:
        self.asked: list[list[str]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self._catalogue = catalogue

    def run(self, given: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        specs = given["specs"]
        self.asked.append([spec["model"]["backbone"] for spec in specs])
        assert self.go_on.wait(60)
        return {"problems": [[] for _ in specs], "catalogue": list(self._catalogue)}


def stand_in(monkeypatch: pytest.MonkeyPatch, *catalogue: str) -> StandIn:
    child = StandIn(catalogue)
    monkeypatch.setattr(ChildProgram, "run", lambda _, given, what: child.run(given))
    return child


def upload(client: TestClient, headers: dict[str, str] | None = None) -> str:
    archive = ("flowers.zip", zip_of(photographs()))
    answer = client.post("/v1/files", files={"file": archive}, data={"purpose": "fine-tune"}, headers=headers or {})
    return str(answer.json()["id"])


def test_a_model_on_the_hub_is_refused_unless_the_operator_allows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child, model = stand_in(monkeypatch), "hf-hub:timm/resnet18.a1_in1k"
    arms = {"methods": ["linear_probe", "full"]}
    with in_process(tmp_path / "closed", wait=False) as client:
        file_id = upload(client)
        for path, body in (
            (JOBS, {"training_file": file_id, "model": model}),
            (COMPARISONS, {"training_file": file_id, "model": model, **arms}),
            (COMPARISONS, {"training_file": file_id, "models": [model, DEFAULT_BACKBONE]}),
            (f"/v1/files/{file_id}/check", {"model": model}),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code == 422
            (problem,) = answer.json()["errors"]
            assert "is on a hub that this server does not download from" in problem["detail"]
        assert child.asked == []
    with in_process(tmp_path / "open", wait=False, hub_models=True) as client:
        assert client.post(JOBS, json={"training_file": upload(client), "model": model}).status_code == 201
    assert child.asked == [[model]]


def test_the_operator_allows_models_on_the_hub_with_a_variable() -> None:
    allowed = {given: ServerSettings.from_environment({"FINETUNE_HUB_MODELS": given}).hub_models for given in ("", "0", "1")}
    assert allowed == {"": False, "0": False, "1": True}


def test_a_name_that_no_hub_can_have_is_never_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = stand_in(monkeypatch)
    with in_process(tmp_path, wait=False, hub_models=True) as client:
        answer = client.post(JOBS, json={"training_file": upload(client), "model": "hf-hub:../../etc"})
    assert answer.status_code == 422
    assert "is not of the form hf-hub:OWNER/NAME" in answer.json()["detail"]
    assert child.asked == []


def test_a_check_that_ends_without_an_answer_accepts_nothing_and_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_process(tmp_path, wait=False) as client:
        file_id = upload(client)
        with monkeypatch.context() as patched:
            patched.setattr(spec_check, "COMMAND", ("false",))
            for body in ({"model": "resnet18"}, {"augmentation": {"transforms": [{"HorizontalFlip": {}}]}}):
                answer = client.post(JOBS, json={"training_file": file_id, **body})
                assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
                assert "checking model.backbone and augmentation.transforms failed" in answer.json()["detail"]
                assert "Retry-After" in answer.headers
        assert client.get(JOBS).json()["data"] == []
        child = stand_in(monkeypatch)
        for suffix in ("first", "second"):
            assert client.post(JOBS, json={"training_file": file_id, "model": "resnet18", "suffix": suffix}).status_code == 201
    assert child.asked == [["resnet18"]]  # once: what is good is remembered


def test_the_names_that_a_check_lists_need_no_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = stand_in(monkeypatch, "resnet18", "resnet50")
    with in_process(tmp_path, wait=False) as client:
        file_id = upload(client)
        for model in ("resnet18", "resnet50"):
            assert client.post(JOBS, json={"training_file": file_id, "model": model, "suffix": model}).status_code == 201
    assert child.asked == [["resnet18"]]


def test_a_name_that_timm_does_not_list_costs_no_process_once_the_list_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = stand_in(monkeypatch, "resnet18", "resnet50", "resnet50.a1_in1k")
    with in_process(tmp_path, wait=False) as client:
        assert client.post(JOBS, json={"training_file": upload(client), "model": "resnet18"}).status_code == 201
    with in_process(tmp_path, wait=False) as client:  # the next server knows it, too
        file_id = upload(client)
        for model, said in (
            ("resnet51", "timm has no architecture 'resnet51'. Did you mean 'resnet50' or 'resnet18'?"),
            ("resnet50.a9", "resnet50 has no weights tagged 'a9'; its tags are a1_in1k."),
            ("resnet50.", "resnet50 has no weights tagged ''; its tags are a1_in1k."),
        ):
            for path, body in ((JOBS, {"model": model}), (COMPARISONS, {"models": [model, "resnet18"]})):
                answer = client.post(path, json={"training_file": file_id, **body})
                assert answer.status_code == 422
                assert said in answer.json()["detail"]
        body = {"training_file": file_id, "model": "resnet50.a1_in1k", "suffix": "tagged"}
        assert client.post(JOBS, json=body).status_code == 201
    assert child.asked == [["resnet18"]]


def test_known_names_wait_for_no_check_and_one_owner_has_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = stand_in(monkeypatch)
    keys = KeyStore(open_jobs(tmp_path))
    ann, bob = ({"Authorization": f"Bearer {keys.create(name, ['jobs'])[0]}"} for name in ("ann", "bob"))
    with in_process(tmp_path, wait=False) as client, ThreadPoolExecutor(4) as threads:
        files = {str(key): upload(client, key) for key in (ann, bob)}

        def create(key: dict[str, str], model: str, suffix: str) -> int:
            body = {"training_file": files[str(key)], "model": model, "suffix": suffix}
            return client.post(JOBS, json=body, headers=key).status_code

        child.go_on.clear()
        try:
            slow = [threads.submit(create, ann, f"slow{number}", f"ann{number}") for number in range(3)]
            until(lambda: len(child.asked) == 1)
            slow.append(threads.submit(create, bob, "slow3", "bob"))
            until(lambda: ["slow3"] in child.asked)
            assert len(child.asked) == 2  # of three requests of one owner, one is being checked
            assert create(bob, DEFAULT_BACKBONE, "known") == 201
            assert not any(one.done() for one in slow)
        finally:
            child.go_on.set()
        assert [one.result() for one in slow] == [201] * 4
    assert sorted(child.asked) == [["slow0"], ["slow1"], ["slow2"], ["slow3"]]
