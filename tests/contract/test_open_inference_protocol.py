"""The Open Inference Protocol, asked by the stock client of another inference server, and by requests that no client sends."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from serving import LiveServer, in_process, live_server, registered
from standin import picture, write_bundle
from starlette.testclient import TestClient
from tritonclient.utils import InferenceServerException

from finetune.bundle.predictor import Predictor


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    registry = registered(folder, write_bundle(folder / "bundle"))
    registry.register(folder / "bundle", "colours")
    return folder


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[LiveServer]:
    with live_server(home) as server:
        yield server


@pytest.fixture(scope="module")
def client(home: Path) -> Iterator[TestClient]:
    with in_process(home) as client:
        yield client


@pytest.fixture(scope="module")
def predictor(home: Path) -> Predictor:
    return Predictor.load(home / "models" / "colours" / "1")


def test_the_stock_client_asks_about_the_server_and_its_models(server: LiveServer, predictor: Predictor) -> None:
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours")
    assert client.is_model_ready("colours", "2")
    assert not client.is_model_ready("colours", "9")
    assert client.get_server_metadata()["name"] == "finetune"
    found = client.get_model_metadata("colours")
    height, width = predictor.manifest.preprocess.input_size_px
    assert found["versions"] == ["1", "2"]
    assert found["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, height, width, 3]}]
    assert {one["name"] for one in found["outputs"]} == set(predictor.manifest.outputs)
    client.close()


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_the_stock_client_runs_a_batch_of_pixels(server: LiveServer, predictor: Predictor, binary: bool) -> None:
    pixels = np.stack([predictor.manifest.preprocess.load(picture(colour)) for colour in ("red", "green", "blue")])
    asked = triton.InferInput("images", list(pixels.shape), "UINT8")
    asked.set_data_from_numpy(pixels, binary_data=binary)
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("probs", "embedding")]
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    answer = client.infer("colours", [asked], model_version="1", outputs=outputs, request_id="r1")
    expected = predictor.run(pixels)
    np.testing.assert_allclose(answer.as_numpy("probs"), expected.probs, rtol=1e-6)
    np.testing.assert_allclose(answer.as_numpy("embedding"), expected.embedding, rtol=1e-6)
    told = answer.get_response()
    assert (told["model_name"], told["model_version"], told["id"]) == ("colours", "1", "r1")
    client.close()


def test_the_stock_client_sends_encoded_files_and_reads_classes(server: LiveServer) -> None:
    asked = triton.InferInput("images", [2], "BYTES")
    asked.set_data_from_numpy(np.array([picture("red"), picture("blue")], dtype=object))
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    answer = client.infer("colours", [asked], outputs=[triton.InferRequestedOutput("probs", class_count=1)])
    labels = [text.decode().split(":")[2] for text in answer.as_numpy("probs").ravel()]
    assert labels == ["red", "blue"]
    client.close()


def test_the_stock_client_is_told_what_is_wrong(server: LiveServer) -> None:
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    asked = triton.InferInput("images", [1, 2, 2, 3], "FP32")
    asked.set_data_from_numpy(np.zeros((1, 2, 2, 3), np.float32))
    with pytest.raises(InferenceServerException) as refused:
        client.infer("colours", [asked])
    assert refused.value.status() == "422"
    assert (
        refused.value.message()
        == "the input has an unsupported type; inputs[0].datatype: must be UINT8 (pixels) or BYTES (encoded files)"
    )
    with pytest.raises(InferenceServerException, match="no model 'nothing'"):
        client.get_model_metadata("nothing")
    client.close()


def good(**changes: Any) -> dict[str, Any]:
    return {
        "name": "images",
        "datatype": "BYTES",
        "shape": [1],
        "parameters": {"binary_data_size": 4 + len(picture())},
        **changes,
    }


def post(client: TestClient, head: Any, binary: bytes | None = None) -> Any:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    binary = struct.pack("<I", len(picture())) + picture() if binary is None else binary
    headers = {"Inference-Header-Content-Length": str(len(text))}
    return client.post("/v2/models/colours/infer", content=text + binary, headers=headers)


WRONG: list[tuple[Any, bytes | None, str]] = [
    (b"no json", None, "not JSON"),
    ([], None, "exactly one input"),
    ({"inputs": []}, None, "exactly one input"),
    ({"inputs": [good(name="pixels")]}, None, "inputs[0].name"),
    ({"inputs": [good(datatype="FP32")]}, None, "inputs[0].datatype"),
    ({"inputs": [good(shape=[65])]}, None, "at most 64 images"),
    ({"inputs": [good(shape=[0])]}, None, "inputs[0].shape"),
    ({"inputs": [good(shape="1")]}, None, "inputs[0].shape"),
    ({"inputs": [good()]}, b"\xff\xff\xff\xff", "binary_data_size"),
    ({"inputs": [good(parameters={"binary_data_size": 4})]}, b"\xff\xff\xff\xff", "must be 1 files"),
    ({"inputs": [good(parameters={})]}, b"", "as binary data"),
    ({"inputs": [good()], "outputs": [{"name": "nothing"}]}, None, "is not one of probs"),
    ({"inputs": [good()], "outputs": ["probs"]}, None, "list of objects"),
    ({"inputs": [good(datatype="UINT8", shape=[1, 2, 2, 3], parameters={}, data=[0] * 12)]}, b"", "the model takes"),
    ({"inputs": [good(datatype="UINT8", shape=[1, 2, 2, 3], parameters={}, data=[256] * 12)]}, b"", "whole numbers 0 to 255"),
    ({"inputs": [good(datatype="UINT8", shape=[1, 2, 2, 3], parameters={}, data=["x"] * 12)]}, b"", "whole numbers 0 to 255"),
    ({"inputs": [good(datatype="UINT8", shape=[1, 2, 2, 3], parameters={}, data=[0] * 5)]}, b"", "whole numbers 0 to 255"),
]


@pytest.mark.parametrize(("head", "binary", "said"), WRONG)
def test_a_request_that_is_off_is_refused_with_its_place(client: TestClient, head: Any, binary: bytes | None, said: str) -> None:
    answer = post(client, head, binary)
    assert answer.status_code == 422
    assert said in answer.text


def test_a_file_that_is_no_image_is_refused_as_on_predict(client: TestClient) -> None:
    binary = struct.pack("<I", 3) + b"abc"
    answer = post(client, {"inputs": [good(parameters={"binary_data_size": 7})]}, binary)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_image")
    assert post(client, {"inputs": [good()]}).status_code == 200
    assert client.post("/v2/models/colours@1/infer", content=b"{}").status_code == 404
    assert client.post("/v2/models/nothing/infer", content=b"{}").status_code == 404
