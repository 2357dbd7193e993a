"""Requests that were right and then damaged, byte by byte or value by value: each is answered, none with a server error."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from archives import photographs, tar_of, zip_of
from serving import in_process, registered
from standin import picture, write_bundle
from starlette.testclient import TestClient

from service.spec_check import SpecChecker

# Pillow warns of a large picture before our own limits decide about it.
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")

NASTY: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 1e308, -1e308, 10**400, "", "\0", "x" * 5000, "../../etc/passwd", "file-none", "ftjob-none", "\ud800",
    "NaN", [], {}, [[]], [None], {"": None}, {"a": {"b": {"c": []}}}, "auto", "null", "é" * 100, ["full"] * 50, "1e9",
)  # fmt: skip
BOUNDARY = "boundary-of-the-test"


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server whose check of names does not start a process for each request; faults are answered, not raised."""
    monkeypatch.setattr(SpecChecker, "problems", lambda self, specs, answers: [() for _ in specs])
    registered(tmp_path, write_bundle(tmp_path / "bundle"))
    with in_process(tmp_path, max_unfinished_jobs=20) as started:
        yield started


def valid_bodies(file_id: str) -> list[tuple[str, dict[str, Any]]]:
    job = {
        "training_file": file_id, "model": "resnet18", "method": {"type": "partial", "stages": 2}, "suffix": "flowers", "seed": 3,
        "hyperparameters": {"n_epochs": 3, "batch_size": "auto", "learning_rate": 0.01}, "metadata": {"team": "garden"},
        "data": {"val_fraction": 0.2, "test_fraction": 0.2}, "augmentation": {"policy": "light"}, "export": {"quantize": "int8"},
    }  # fmt: skip
    arms = [{"name": "a", "set": {"method": "full"}}, {"name": "b", "set": {"hyperparameters.n_epochs": 2}}]
    return [
        ("/v1/fine_tuning/jobs", job),
        ("/v1/fine_tuning/comparisons", {**job, "methods": ["linear_probe", "full"], "models": ["resnet18"], "seeds": 2}),
        ("/v1/fine_tuning/comparisons", {**job, "arms": arms, "margin": 0.02, "budget_seconds": 60, "register_chosen": False}),
        ("/v1/fine_tuning/comparisons", {"runs": ["ftjob-a", "ftjob-b"], "margin": 0.1, "metadata": {}}),
        ("/v1/batch_predictions", {"input_file": file_id, "model": "colours@1", "embedding": True, "metadata": {"a": "b"}}),
        ("/v1/models/colours/aliases/champion", {"version": "1", "minimum": {"test/top1": 0.5}, "force": True}),
        ("/v1/deployments/default", {"reference": "colours", "canary": {"reference": "colours@1", "percent": 5.0}}),
    ]


def other_values(document: Any, rng: random.Random) -> Any:
    """The document with one value, somewhere in it, replaced, removed, doubled or put under another key."""
    if not isinstance(document, dict | list) or not document or rng.random() < 0.15:
        return rng.choice(NASTY)
    if isinstance(document, list):
        position = rng.randrange(len(document))
        return [*document[:position], other_values(document[position], rng), *document[position + rng.randrange(2) :]]
    key = rng.choice(list(document))
    changed = dict(document)
    match rng.randrange(4):
        case 0:
            del changed[key]
        case 1:
            changed[str(rng.choice(NASTY))[:300]] = changed.pop(key)
        case _:
            changed[key] = other_values(document[key], rng)
    return changed


def other_bytes(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a few places flipped, cut out, doubled or filled with something else, or cut short."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(changed) + 1)
        end = min(len(changed), start + rng.randint(1, 40))
        filling = (b"", bytes(changed[start:end]) * 2, rng.randbytes(end - start), b"\0" * 30, b'{"a":' * 200, b"\xff" * 8)
        changed[start:end] = rng.choice(filling)
        if rng.random() < 0.1:
            del changed[start:]
    return bytes(changed)


def sent(client: TestClient, rng: random.Random, bodies: list[tuple[str, dict[str, Any]]], files: list[bytes]) -> tuple[str, int]:
    """Send one damaged request; return what it was and the status of its answer."""
    json_type = {"content-type": "application/json"}

    def values() -> tuple[str, int]:
        path, body = rng.choice(bodies)
        text = json.dumps(other_values(body, rng), ensure_ascii=True)
        method = "PUT" if "aliases" in path or "deployments" in path else "POST"
        return "values", client.request(method, path, content=text, headers=json_type).status_code

    def broken_json() -> tuple[str, int]:
        path, body = rng.choice(bodies)
        damaged = other_bytes(json.dumps(body).encode(), rng)
        return "JSON", client.post(path, content=damaged, headers=json_type).status_code

    def image() -> tuple[str, int]:
        damaged = other_bytes(rng.choice(files), rng)
        query = rng.choice(("", "?top_k=2", "?explain=true", "?embedding=1&top_k=-1", "?top_k=%00", "?x=y"))
        headers = {"content-type": rng.choice((b"image/png", b"application/octet-stream", b"", b"image/\xff", b"text/html"))}
        return "image", client.post(f"/predict{query}", content=damaged, headers=headers).status_code

    def form() -> tuple[str, int]:
        body = other_bytes(_form(rng.choice(("image", "images", "file")), rng.choice(files)), rng)
        kind = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
        path = rng.choice(("/predict", "/v1/models/colours/predict"))
        return "form", client.post(path, content=body, headers=kind).status_code

    def upload() -> tuple[str, int]:
        archive = other_bytes(rng.choice((zip_of(photographs()), tar_of(photographs()))), rng)
        data = {"purpose": rng.choice(("fine-tune", "batch", "\0"))}
        return "upload", client.post("/v1/files", files={"file": ("a.zip", archive)}, data=data).status_code

    def query() -> tuple[str, int]:
        path = rng.choice([path for path, _ in bodies] + ["/v1/files", "/v1/models", "/v1/models/colours/versions/1/predictions"])
        key = rng.choice(("after", "limit", "status", "metadata[a]", "order", "format", "offset", "tail"))
        return "query", client.get(path, params={key: str(rng.choice(NASTY))[:2000].encode("utf-8", "replace")}).status_code

    kinds: list[Callable[[], tuple[str, int]]] = [values, broken_json, image, form, query]
    return upload() if rng.random() < 0.003 else rng.choice(kinds)()


def _form(name: str, data: bytes) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    option = f'\r\n--{BOUNDARY}\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n2\r\n--{BOUNDARY}--\r\n'
    return head.encode() + data + option.encode()


def send_many(client: TestClient, count: int, seed: int) -> Counter[tuple[str, int]]:
    archive = {"file": ("flowers.zip", zip_of(photographs()))}
    file_id = client.post("/v1/files", files=archive, data={"purpose": "fine-tune"}).json()["id"]
    bodies, rng = valid_bodies(file_id), random.Random(seed)
    files = [picture("red"), picture("blue", file_format="JPEG"), picture("green", file_format="GIF")]
    answers: Counter[tuple[str, int]] = Counter()
    for _ in range(count):
        what, status = sent(client, rng, bodies, files)
        assert status < 500 or status in (501, 503), f"{what} was answered with {status}"
        answers[what, status] += 1
    return answers


def test_damaged_requests_are_never_answered_with_a_server_error(client: TestClient) -> None:
    answers = send_many(client, 400, seed=1)
    assert {what for what, _ in answers} >= {"values", "JSON", "image", "form", "query"}
    assert {status for _, status in answers} >= {200, 400, 415, 422}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_damaged_requests_are_never_answered_with_a_server_error(client: TestClient) -> None:
    answers = send_many(client, 10_000, seed=2)
    assert answers.total() == 10_000
    assert "upload" in {what for what, _ in answers}
