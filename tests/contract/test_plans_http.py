"""What methods would train, and for how long, before anything is uploaded. The measurement is a stand-in."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import in_process, until
from starlette.requests import ClientDisconnect, Request
from starlette.testclient import TestClient
from starlette.types import Message

from finetune.errors import InvalidInput, Overloaded
from finetune.jobs.database import open_jobs
from finetune.jobs.keys import KeyStore
from finetune.spec import DEFAULT_BACKBONE
from finetune.storage.workspace import Workspace
from service import plans
from service.child import ChildProgram
from service.disconnects import while_connected
from service.plans import MAX_OF_OWNER, Planner

PLANS = "/v1/fine_tuning/plans"
CATALOGUE = ["resnet18", "resnet18.a1_in1k", "resnet34"]
STAGES = [{"index": index, "name": f"blocks.{index}", "n_parameters": 100, "output_shape": [8, 7, 7]} for index in range(4)]


class StandIn:
    """Answers as the child process does; `asked` is the backbones of each call."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.problem = ""

    def answer(self, given: Mapping[str, Any]) -> dict[str, Any]:
        if "specs" in given:
            return {"problems": [[] for _ in given["specs"]], "catalogue": CATALOGUE}
        self.asked.append(given["backbone"])
        assert self.go_on.wait(60)
        if self.problem:
            return {"problem": self.problem}
        return {
            "speeds": {
                "backbone": given["backbone"], "stages": STAGES, "n_parameters": 400, "has_batch_norm": True,
                "resizable": True, "input_size_px": [224, 224], "device": "cpu", "threads": given["threads"],
                "start_seconds": 3.0, "decode_seconds": 0.001, "decode_seconds_per_megabyte": 0.01,
                "feature_seconds": 0.01, "prefix_shares": {"0": 0.0, "2": 0.8, "3": 0.9, "4": 1.0},
                "step_seconds": {"0": 0.05, "2": 0.02, "3": 0.01, "4": 0.0},
            }
        }  # fmt: skip


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    child = StandIn()
    monkeypatch.setattr(ChildProgram, "run", lambda _, given, what: child.answer(given))
    return child


@pytest.fixture
def client(tmp_path: Path, child: StandIn) -> Iterator[TestClient]:
    with in_process(tmp_path, wait=False) as client:
        yield client


def test_each_method_has_its_stages_and_its_time(client: TestClient) -> None:
    methods = ["linear_probe", {"type": "partial", "stages": 2}, "auto", "full"]
    plan = client.post(PLANS, json={"methods": methods, "images": 150, "classes": 4, "bytes": 15_000_000}).json()
    assert plan["backbone"] == DEFAULT_BACKBONE
    assert [stage["name"] for stage in plan["stages"]] == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert [one["trains"] for one in plan["methods"]] == [[], [2, 3], [], [0, 1, 2, 3]]
    assert [one["may_train"] for one in plan["methods"]] == [[], [], [0, 1, 2, 3], []]
    assert plan["methods"][1]["method"] == {"type": "partial", "stages": 2}
    for one in plan["methods"]:
        assert 0 < one["seconds"]["low"] < one["seconds"]["about"] < one["seconds"]["high"]


def test_a_backbone_is_measured_once_also_for_those_who_ask_meanwhile_and_for_the_next_server(
    client: TestClient, child: StandIn, tmp_path: Path
) -> None:
    child.go_on.clear()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(client.post, PLANS, json={"methods": ["full"]}) for _ in range(4)]
        until(lambda: child.asked == [DEFAULT_BACKBONE])
        child.go_on.set()
        plans = [answer.result(60).json() for answer in answers]
    assert all(plan == plans[0] for plan in plans)
    assert plans[0]["methods"][0]["seconds"] is None  # no images were named
    with in_process(tmp_path, wait=False) as again:
        assert again.post(PLANS, json={"methods": ["full"]}).json() == plans[0]
    assert child.asked == [DEFAULT_BACKBONE]
    client.post(PLANS, json={"methods": ["full"], "model": {"backbone": "resnet18", "input_size_px": 96}})
    assert child.asked == [DEFAULT_BACKBONE, "resnet18"]


def test_nobody_fills_the_queue_of_measurements(child: StandIn, tmp_path: Path) -> None:
    def question(backbone: str) -> dict[str, Any]:
        return {"backbone": backbone, "input_size_px": None, "device": "cpu", "threads": 1}

    async def ask() -> list[str]:
        planner = Planner(Workspace.at(tmp_path))
        child.go_on.clear()
        waiting = [asyncio.create_task(planner.speeds(question(f"net{number}"), "ann")) for number in range(MAX_OF_OWNER)]
        await asyncio.sleep(0)  # each has taken its place
        with pytest.raises(Overloaded, match="are being measured for you"):
            await planner.speeds(question("another"), "ann")
        waiting.append(asyncio.create_task(planner.speeds(question("bobs"), "bob")))
        await asyncio.sleep(0)
        child.go_on.set()
        found = [(await one).backbone for one in waiting]
        planner.stop()
        return [*found, (await Planner(Workspace.at(tmp_path)).speeds(question("net0"), "ann")).backbone]

    assert asyncio.run(ask()) == [*(f"net{number}" for number in range(MAX_OF_OWNER)), "bobs", "net0"]


def test_what_cannot_be_planned_is_refused_with_the_field(client: TestClient, child: StandIn) -> None:
    for body, field in (
        ({"methods": ["half"]}, "methods[0]"),
        ({"methods": ["full", {"type": "partial", "stages": 9}]}, "methods[1].stages"),
        ({"methods": ["full"], "hyperparameters": {"n_epochs": -1}}, "hyperparameters.n_epochs"),
        ({"methods": ["full"], "model": "hf-hub:timm/resnet18.a1_in1k"}, "model.backbone"),
        ({"methods": ["full"], "model": "nobody@1"}, "model.backbone"),
        ({"methods": ["full"], "training_file": "file-1"}, "training_file"),
        ({"methods": []}, "methods"),
        ({"methods": ["full"], "images": 1, "bytes": 10**400}, "bytes"),
    ):
        answer = client.post(PLANS, json=body)
        assert answer.status_code == 422, body
        assert [one["field"] for one in answer.json()["errors"]] == [field], answer.json()
    child.problem = "resnet34 takes more memory to measure than the 2.0 GiB that a plan may use here"
    for _ in range(2):
        answer = client.post(PLANS, json={"methods": ["full"], "model": "resnet34"})
        assert (answer.status_code, answer.json()["detail"]) == (422, child.problem)
    assert child.asked == [DEFAULT_BACKBONE, "resnet34"], "what cannot be measured is not measured again"
    answer = client.post(PLANS, json={"methods": ["full"], "model": "resnet19"})
    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {"field": "model.backbone", "detail": "timm has no architecture 'resnet19'. Did you mean 'resnet18' or 'resnet34'?"}
    ]
    assert "resnet19" not in child.asked


@pytest.mark.parametrize(
    ("field", "value"),
    [("images", True), ("images", "12"), ("images", 1.5), ("classes", True), ("bytes", True), ("methods", "full")],
)
def test_a_value_of_another_type_is_no_number(client: TestClient, field: str, value: Any) -> None:
    answer = client.post(PLANS, json={"methods": ["full"], field: value})
    assert answer.status_code == 422
    assert [one["field"] for one in answer.json()["errors"]] == [field]


MEASURING = ("sleep", "600.25")


def measuring() -> list[int]:
    """The processes of this one that measure; others that it has, such as those of a fixture, are left out."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if tuple(child.cmdline()) == MEASURING:
                found.append(child.pid)
    return found


def test_a_measurement_that_nobody_waits_for_is_killed_and_the_next_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "CHILD", MEASURING)

    async def leave() -> None:
        planner = Planner(Workspace.at(tmp_path))
        first = [asyncio.create_task(planner.speeds({"backbone": "giant"}, "ann")) for _ in range(2)]
        second = asyncio.create_task(planner.speeds({"backbone": "other"}, "ann"))
        await _until(lambda: len(measuring()) == 1)
        (running,) = measuring()
        first[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await first[0]
        assert measuring() == [running], "one request still waits for it"
        first[1].cancel()
        await _until(lambda: measuring() not in ([running], []))
        second.cancel()
        await _until(lambda: measuring() == [])
        planner.stop()

    asyncio.run(leave())


@pytest.mark.parametrize(
    ("script", "error", "says"),
    [
        ("kill -XCPU $$", InvalidInput, "giant takes too long to measure on this machine"),
        ("exit 3", Overloaded, "measuring giant failed; the server's log says why"),
    ],
)
def test_how_a_measurement_ended_decides_whose_fault_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: type[Exception], says: str
) -> None:
    monkeypatch.setattr(plans, "CHILD", ("sh", "-c", script))
    planner = Planner(Workspace.at(tmp_path))
    with pytest.raises(error, match=says):
        asyncio.run(planner.speeds({"backbone": "giant"}, "ann"))
    planner.stop()


def test_the_measurement_ends_when_its_client_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the server's end of the connection."""

    async def scenario() -> None:
        left, cancelled = asyncio.Event(), asyncio.Event()

        async def receive() -> Message:
            await left.wait()
            return {"type": "http.disconnect"}

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        request = Request({"type": "http", "headers": []}, receive)
        waiting = asyncio.create_task(while_connected(request, work()))
        await asyncio.sleep(0)
        left.set()
        with pytest.raises(ClientDisconnect):
            await waiting
        assert cancelled.is_set()

    asyncio.run(scenario())


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.01)


def test_a_key_that_may_not_train_is_told_no_plan(client: TestClient, tmp_path: Path) -> None:
    keys = KeyStore(open_jobs(tmp_path))
    asker, _ = keys.create("bob", ("predict",))
    until(lambda: client.post(PLANS, json={"methods": ["full"]}).status_code == 401)
    answer = client.post(PLANS, json={"methods": ["full"]}, headers={"Authorization": f"Bearer {asker}"})
    assert answer.status_code == 403
