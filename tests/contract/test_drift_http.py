"""The drift watch over HTTP: what feeds it, what it says, who may read it, what it tells, and what a restart keeps."""

from __future__ import annotations

import contextlib
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from archives import zip_of
from click.testing import CliRunner
from serving import in_process, registered, state_of, until
from standin import COLOURS, picture, write_bundle
from starlette.testclient import TestClient

from finetune.bundle.access import Access
from finetune.bundle.predictor import Predictor
from finetune.bundle.registry import Registry
from finetune.cli import cli
from finetune.client import Client
from finetune.errors import Conflict
from finetune.jobs.database import open_jobs
from finetune.jobs.keys import KeyStore
from finetune.jobs.webhooks import WebhookStore
from finetune.metrics.novelty import Subspace
from finetune.monitoring.drift import MIN_WINDOW
from finetune.monitoring.reference import Reference
from finetune.monitoring.samples import Sample, SamplingPolicy, samples_of
from finetune.monitoring.statistics import concatenated, statistics_of
from finetune.storage.files import write_json

PATH = "/v1/models/colours/versions/1/drift"
N_REFERENCE = 300
GREY_IS_KNOWN = Subspace(np.full(3, 1 / np.sqrt(3), np.float32), np.zeros((0, 3), np.float32))


def bundle_in(folder: Path) -> Path:
    """A bundle whose reference is its answers to as many red, green and blue pictures."""
    predictor = Predictor.load(write_bundle(folder / "without"))
    answers = [predictor.predict(picture(colour, (16, 16))) for colour in COLOURS]
    each = [statistics_of("multiclass", one.probs[None], one.embedding[None], GREY_IS_KNOWN) for one in answers]
    reference = Reference("test", concatenated(each * (N_REFERENCE // 3)))
    return write_bundle(folder / "with", subspace=GREY_IS_KNOWN, reference=reference)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    registered(tmp_path, bundle_in(tmp_path / "bundle"))
    registered(tmp_path, write_bundle(tmp_path / "old"), "old")
    return tmp_path


@pytest.fixture
def client(home: Path) -> Iterator[TestClient]:
    with in_process(home) as client:
        yield client


def send(client: TestClient, colours: list[str], path: str = "/predict", at_once: int = 50) -> None:
    """Ask about pictures, `at_once` in a request."""
    for begin in range(0, len(colours), at_once):
        files = [("images", (f"{colour}.png", picture(colour, (16, 16)))) for colour in colours[begin : begin + at_once]]
        answer = client.post(path, files=files)
        assert (answer.status_code, answer.json()["n_failed"]) == (200, 0)


def mixed(n: int) -> list[str]:
    return [list(COLOURS)[number % 3] for number in range(n)]


def drift(client: TestClient, path: str = PATH) -> dict:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_from_nothing_over_too_few_to_steady_and_drifted(client: TestClient) -> None:
    nothing = drift(client)
    assert (nothing["state"], nothing["n"], nothing["tests"], nothing["hours"]) == ("collecting", 0, [], [])
    assert nothing["reference"] == {"split": "test", "n": N_REFERENCE}
    send(client, mixed(37))
    assert drift(client)["sentence"] == "Not enough yet: 37 of 200 images"
    send(client, mixed(MIN_WINDOW - 37))
    steady = drift(client)
    assert (steady["state"], steady["n"], steady["n_needed"]) == ("steady", MIN_WINDOW, MIN_WINDOW)
    assert [test["name"] for test in steady["tests"]] == ["confidence", "classes", "embedding"]
    send(client, ["red"] * 400)
    drifted = drift(client)
    assert (drifted["state"], drifted["object"], drifted["model"], drifted["version"]) == (
        "drifted",
        "model.drift",
        "colours",
        "1",
    )
    assert [test["name"] for test in drifted["tests"] if test["drifted"]] == ["classes"]
    (classes,) = (test for test in drifted["tests"] if test["drifted"])
    assert classes["adjusted_p"] <= drifted["alpha"]
    assert classes["effect"] >= classes["threshold"]
    assert drifted["sentence"].endswith("differ in which classes it predicts")
    assert [hour["n"] for hour in drifted["hours"]] in ([600], *([n, 600 - n] for n in range(600)))


def test_bundles_of_earlier_versions_have_nothing_to_be_compared_with(client: TestClient) -> None:
    send(client, mixed(3), "/v1/models/old/predict")
    found = drift(client, "/v1/models/old/versions/champion/drift")
    assert (found["state"], found["reference"], found["n"], found["tests"]) == ("no_reference", None, 3, [])
    assert "the bundle has no reference" in found["sentence"]
    assert client.get("/v1/models/old/versions/7/drift").status_code == 404


def test_every_way_of_asking_feeds_it_and_what_cannot_be_read_does_not(client: TestClient) -> None:
    client.post("/predict", content=picture("red"))
    client.post("/v1/models/colours/predict?top_k=1&explain=true", files={"image": picture("green")})
    bad = client.post("/predict", files=[("images", ("a.png", picture("red"))), ("images", ("b.png", b"no image"))])
    assert bad.json()["n_failed"] == 1
    assert client.post("/predict", content=b"no image").status_code == 415
    pixels = np.zeros((4, 16, 16, 3), np.uint8)
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
    assert client.post("/v2/models/colours/infer", json={"inputs": [tensor]}).status_code == 200
    data = b"".join(struct.pack("<I", len(one)) + one for one in (picture("red"), picture("blue")))
    given = {"name": "images", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [given]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    assert client.post("/v2/models/colours/versions/1/infer", content=head + data, headers=headers).status_code == 200
    assert drift(client)["n_seen"] == 1 + 1 + 1 + 4 + 2


def test_a_batch_prediction_feeds_it(client: TestClient, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {f"{number}.png": picture(colour, (16, 16)) for number, colour in enumerate(mixed(30))}
    upload = client.post("/v1/files", files={"file": ("a.zip", zip_of(members))}, data={"purpose": "batch"}).json()
    write_json(home / "request.json", {"input_file": str(home / "files" / upload["id"]), "model": "colours@1"})
    monkeypatch.setenv("FINETUNE_HOME", str(home))
    done = CliRunner().invoke(cli, ["predict", str(home / "request.json"), "--run-dir", str(home / "runs" / "batch-1"), "--json"])
    assert done.exit_code == 0, done.output
    assert not list((home / "runs" / "batch-1").rglob("*.statistics"))
    until(lambda: drift(client)["n_seen"] == 30)


def test_requests_at_the_same_time_lose_no_answer_and_count_none_twice(client: TestClient) -> None:
    threads = [threading.Thread(target=send, args=(client, mixed(60), "/predict", 2)) for _ in range(6)]
    for thread in threads:
        thread.start()
    seen = []
    while any(thread.is_alive() for thread in threads):
        seen.append(drift(client)["n_seen"])
    for thread in threads:
        thread.join()
    assert drift(client)["n_seen"] == 360
    assert seen == sorted(seen)


def test_it_is_kept_over_a_restart_and_deleted_with_the_version(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(home))
    with in_process(home) as client:
        send(client, ["red"] * 250)
    shown = CliRunner().invoke(cli, ["models", "drift", "colours", "--json"])
    assert shown.exit_code == 1, shown.output
    assert (json.loads(shown.output)["state"], json.loads(shown.output)["n"]) == ("drifted", 250)
    told = CliRunner().invoke(cli, ["models", "drift", "colours@1"]).output
    assert "Drifted: the last 250 images and the 300 test images differ in which" in " ".join(told.split())
    with in_process(home) as client:
        assert drift(client)["n"] == 250
        send(client, ["red"] * 50)
        assert drift(client)["n"] == 300
        monitoring = Registry(home / "models").monitoring_of("colours", "1")
        assert monitoring.is_dir()
        assert client.delete("/v1/models/colours?force=true").status_code == 200
        assert client.get(PATH).status_code == 404
    assert not monitoring.parent.exists()


def test_what_is_answered_now_can_be_accepted_as_the_reference_and_that_undone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(home))
    with in_process(home) as client:
        send(client, ["red"] * 150)
        early = client.put(f"{PATH}/reference", json={"use": "live"})
        assert (early.status_code, "150 live images are too few" in early.json()["detail"]) == (409, True)
        assert client.put(f"{PATH}/reference", json={"use": "dead"}).status_code == 422
        send(client, ["red"] * 150)
        assert drift(client)["state"] == "drifted"
        accepted = client.put(f"{PATH}/reference", json={"use": "live"}).json()
        assert (accepted["state"], accepted["reference"]) == ("steady", {"split": "accepted", "n": 300})
        send(client, mixed(600))
        assert drift(client)["state"] == "drifted", "from what was accepted"
        assert client.put(f"{PATH}/reference", json={"use": "bundle"}).json()["reference"]["split"] == "test"
        send(client, ["red"] * 50)
        assert client.put(f"{PATH}/reference", json={"use": "live"}).json()["reference"]["n"] == 950
    run = CliRunner().invoke
    assert json.loads(run(cli, ["models", "drift", "colours", "--json"]).output)["reference"]["split"] == "accepted"
    assert json.loads(run(cli, ["models", "drift", "colours", "--reset", "--json"]).output)["reference"]["split"] == "test"
    assert json.loads(run(cli, ["models", "drift", "colours", "--accept", "--json"]).output)["reference"]["split"] == "accepted"
    assert run(cli, ["models", "drift", "colours", "--accept", "--reset"]).exit_code == 2
    with pytest.raises(Conflict, match="0 live images are too few"):
        run(cli, ["models", "drift", "old", "--accept"], catch_exceptions=False, standalone_mode=False)
    with in_process(home) as client:  # follows what a shell chooses
        assert drift(client)["reference"]["split"] == "accepted"
        run(cli, ["models", "drift", "colours", "--reset"])
        state_of(client).drift.run_round()
        assert drift(client)["reference"]["split"] == "test"


def test_drift_from_a_reference_that_was_chosen_again_has_begun_at_once(client: TestClient) -> None:
    send(client, ["red"] * MIN_WINDOW)
    assert client.put(f"{PATH}/reference", json={"use": "live"}).json()["drifted_since"] is None
    again = client.put(f"{PATH}/reference", json={"use": "bundle"}).json()
    assert again["state"] == "drifted"
    assert again["drifted_since"] is not None
    assert drift(client)["drifted_since"] == again["drifted_since"]


def test_images_that_cannot_be_read_are_not_counted(client: TestClient) -> None:
    files = [("images", ("a.png", picture("red"))), ("images", ("b.png", b"no image")), ("images", ("c.png", b""))]
    assert client.post("/predict", files=files).json()["n_failed"] == 2
    assert client.post("/predict", content=b"no image").status_code == 415
    assert drift(client)["n_seen"] == 1
    assert 'finetune_predictions_total{model="colours",role="default",version="1"} 1.0' in client.get("/metrics").text


def test_only_who_may_change_a_model_chooses_its_reference(home: Path) -> None:
    keys = KeyStore(open_jobs(home))
    predicting, other = (
        {"Authorization": f"Bearer {keys.create(name, [scope])[0]}"} for name, scope in (("ann", "predict"), ("bob", "jobs"))
    )
    with in_process(home) as client:
        for key in (predicting, other):
            assert client.put(f"{PATH}/reference", json={"use": "bundle"}, headers=key).status_code == 403


def test_the_python_client_reads_the_same_document(client: TestClient) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=client.get(request.url.path).json()))
    with Client("http://127.0.0.1", transport=transport) as ours:
        assert ours.drift("colours") == drift(client)


def test_who_may_not_use_a_model_does_not_learn_of_its_drift(home: Path) -> None:
    Registry(home / "models").set_access("colours", Access(owner="ann", visibility="private"))
    keys = KeyStore(open_jobs(home))
    ann, bob, metrics = (
        {"Authorization": f"Bearer {keys.create(name, [scope])[0]}"}
        for name, scope in (("ann", "predict"), ("bob", "predict"), ("prometheus", "metrics"))
    )
    with in_process(home) as client:
        assert client.get(PATH, headers=ann).status_code == 200
        hidden = client.get(PATH, headers=bob)
        assert (hidden.status_code, "no model 'colours'" in hidden.json()["detail"]) == (404, True)
        assert client.get(PATH, headers=metrics).status_code == 403
        assert client.get(PATH).status_code == 401


def test_prometheus_sees_it(client: TestClient) -> None:
    send(client, ["red"] * MIN_WINDOW)
    labels = 'model="colours",version="1"'
    until(lambda: f"finetune_drift{{{labels}}} 1.0" in client.get("/metrics").text)
    text = client.get("/metrics").text
    assert f"finetune_drift_images{{{labels}}} {float(MIN_WINDOW)}" in text
    assert 'finetune_drift_adjusted_p{model="colours",test="confidence",version="1"} 1.0' in text
    assert 'finetune_drift_effect{model="colours",test="embedding",version="1"} 0.0' in text


def test_a_webhook_is_told_once_when_drift_begins(home: Path) -> None:
    store = WebhookStore(open_jobs(home))
    hook = store.create("ann", "https://127.0.0.1:9/hooks", ["model.drifted"])
    with in_process(home) as client:
        send(client, ["red"] * 250)
        until(lambda: len(store.deliveries(hook.id)) == 1)
        send(client, ["red"] * 250)
        state_of(client).drift.run_round()
        assert drift(client)["drifted_since"] is not None
    (told,) = store.deliveries(hook.id)
    data = json.loads(told.payload)["data"]
    assert (data["model"], data["version"], data["tests"], data["url"]) == ("colours", "1", ["classes"], PATH)
    with in_process(home) as client:  # after a restart it is known
        send(client, ["red"] * 150)
        state_of(client).drift.run_round()
    assert len(store.deliveries(hook.id)) == 1


# --- images that are kept -------------------------------------------------------------------------


def kept(home: Path, model: str = "colours") -> list[Sample]:
    registry = Registry(home / "models")
    return samples_of(registry, registry.lookup(model))


def sampled_bytes(home: Path) -> int:
    """What is kept of the model ``colours`` takes on disk, while a server may be deleting some."""
    total = 0
    for path in list((home / "models/colours/monitoring/1/sampled-inputs").iterdir()):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_nothing_is_kept_unless_it_is_turned_on(home: Path) -> None:
    with in_process(home) as client:
        send(client, mixed(20))
    assert kept(home) == []  # a server that has ended has written what it drew
    assert not list(home.rglob("sampled-inputs"))


def test_what_was_asked_is_kept_with_its_answer_and_its_owner_and_no_secret(home: Path) -> None:
    secret = KeyStore(open_jobs(home)).create("ann", ["predict"])[0]
    ann = {"Authorization": f"Bearer {secret}"}
    data = b"".join(struct.pack("<I", len(one)) + one for one in (picture("red"), picture("blue")))
    given = {"name": "images", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [given]}).encode()
    with in_process(home, sampling=SamplingPolicy(1.0)) as client:
        assert client.post("/predict", content=picture("green", (9, 9)), headers=ann).status_code == 200
        several = [("images", ("secret name.png", picture("red", (7, 7)))), ("images", ("b.png", b"no image"))]
        assert client.post("/v1/models/colours/predict", files=several, headers=ann).json()["n_failed"] == 1
        length = {"Inference-Header-Content-Length": str(len(head))}
        assert client.post("/v2/models/colours/infer", content=head + data, headers=ann | length).status_code == 200
        until(lambda: len(kept(home)) == 4)
    found = {sample.path.read_bytes(): sample.record for sample in kept(home)}
    assert set(found) == {picture("green", (9, 9)), picture("red", (7, 7)), picture("red"), picture("blue")}
    green = found[picture("green", (9, 9))]
    assert (green["owner"], green["predictions"][0]["label"]) == ("ann", "green")
    assert green["confidence"] == pytest.approx(green["predictions"][0]["probability"])
    assert found[picture("blue")]["predictions"][0]["label"] == "blue"
    everything = b"".join(path.read_bytes() for path in home.rglob("sampled-inputs/*.json"))
    assert secret.encode() not in everything
    assert b"secret name" not in everything


def test_a_share_of_the_images_is_kept_within_the_bytes_that_are_allowed_and_goes_with_the_model(
    home: Path,
) -> None:
    with in_process(home, sampling=SamplingPolicy(0.25)) as client:
        for begin in range(0, 200, 50):
            files = [("images", ("a.png", picture("red", (16, 16)) + str(begin + number).encode())) for number in range(50)]
            assert client.post("/predict", files=files).json()["n_failed"] == 0
        until(lambda: 'finetune_sampled_inputs_total{outcome="kept"}' in client.get("/metrics").text)
    assert 10 <= len(kept(home)) <= 100  # 50 with a standard deviation of 6; a server that has ended has written what it drew
    size = sampled_bytes(home)
    with in_process(home, sampling=SamplingPolicy(0.0, max_bytes=size // 2)) as client:  # off again; what is too much goes
        until(lambda: 0 < sampled_bytes(home) <= size // 2)
        assert client.delete("/v1/models/colours?force=true").status_code == 200
    assert not list(home.rglob("sampled-inputs"))


def test_the_first_look_is_taken_as_soon_as_there_are_enough_images(home: Path) -> None:
    with in_process(home) as client:
        send(client, ["red"] * (MIN_WINDOW - 10))
        state = state_of(client)
        state.drift.run_round()
        ((_, _, found),) = state.drift.last_found()
        assert found.state == "collecting"
        send(client, ["red"] * 10)
        state.drift.run_round()
        ((_, _, found),) = state.drift.last_found()
        assert (found.state, found.n) == ("drifted", MIN_WINDOW)
        assert found.drifted_since is not None
        send(client, ["red"] * 50)  # fewer than make another look worth its risk of being wrong
        state.drift.run_round()
        ((_, _, found),) = state.drift.last_found()
        assert found.n == MIN_WINDOW


def test_another_model_in_a_served_folder_begins_a_window_of_its_own(tmp_path: Path) -> None:
    served = bundle_in(tmp_path / "bundle")
    with in_process(tmp_path, model=str(served)) as client:
        send(client, ["red"] * 30)
        state = state_of(client)
        state.drift.run_round()
        assert [(name, found.n_seen) for name, _, found in state.drift.last_found()] == [("colours", 30)]
        other = write_bundle(tmp_path / "other", classes=("a", "b", "c"), cam=False)
        for file in other.iterdir():  # the manifest last
            if file.name != "bundle.json":
                (served / file.name).write_bytes(file.read_bytes())
        (served / "bundle.json").write_bytes((other / "bundle.json").read_bytes())
        until(lambda: client.post("/predict", content=picture("red")).json()["predictions"][0]["label"] == "a")
        state.drift.run_round()
        ((_, _, found),) = state.drift.last_found()
        assert (found.n_seen < 30, found.state) == (True, "no_reference")
