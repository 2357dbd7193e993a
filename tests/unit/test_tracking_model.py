"""A bundle as an MLflow model: pyfunc, MLflow's scoring server and onnx answer as ``/predict`` does, awkward files too."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import mlflow
import mlflow.onnx
import mlflow.pyfunc
import numpy as np
import onnxruntime
import pandas as pd
import pytest
from awkward import READABLE_FILES, REFUSED_FILES
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from PIL import Image
from serving import in_process, registered, until
from standin import picture, write_bundle
from starlette.testclient import TestClient
from tiny_bundle import CLASSES, PREPROCESS, self_test_files, write_tiny_bundle

from finetune.bundle.calibration import Calibration, OperatingPoint
from finetune.bundle.mlflow_model import SCORING_SERVER
from finetune.bundle.predictor import Predictor
from finetune.errors import ImageError, InvalidInput
from finetune.tracking.mlflow.model import write_model

SECONDS = 120
CALIBRATION = Calibration(
    split="val",
    n=40,
    coverage={"0.90": 0.5, "0.95": 0.01},
    class_coverage={"0.90": (0.5, 0.01, None)},
    precision={"0.90": OperatingPoint(0.5, 0.9), "0.95": OperatingPoint(0.97, 0.4)},
)
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "trees"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def folder(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that MLflow stores."""
    written = tmp_path_factory.mktemp("mlflow") / "model"
    write_model(written, bundle)
    return written


@pytest.fixture(scope="module")
def model(folder: Path) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(str(folder))


@pytest.fixture
def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """MLflow's scoring server, in this process."""
    monkeypatch.setitem(sys.modules, SCORING_SERVER, scoring_server)
    with TestClient(scoring_server.init(mlflow.pyfunc.load_model(str(folder)))) as client:
        yield client


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def probabilities(row: dict[str, Any]) -> dict[str, float]:
    return {one["label"]: one["probability"] for one in row["predictions"]}


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_awkward_files_get_the_answers_of_predict_by_every_way(
    bundle: Path, model: mlflow.pyfunc.PyFuncModel, served: TestClient, tmp_path: Path
) -> None:
    registered(tmp_path, bundle, "trees")
    n_asked = 0
    with in_process(tmp_path) as client:
        for name, (data, _) in READABLE_FILES.items():
            answer = client.post("/predict", params={"top_k": len(CLASSES)}, content=data).json()
            expected = {one["label"]: one["probability"] for one in answer["predictions"]}
            by_pyfunc = model.predict(data).to_dict("records")[0]
            request = {"inputs": [text_of(data)], "params": {"top_k": len(CLASSES)}}
            (by_http,) = served.post("/invocations", json=request).json()["predictions"]
            for way, row in {"pyfunc": by_pyfunc, "models serve": by_http}.items():
                assert probabilities(row) == pytest.approx(expected, abs=TOLERANCE), (name, way)
                assert row["label"] == answer["predictions"][0]["label"], (name, way)
            n_asked += 1
    assert n_asked >= 20


def test_the_onnx_flavour_is_the_same_network(folder: Path, bundle: Path) -> None:
    network = mlflow.onnx.load_model(str(folder))
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    predictor = Predictor.load(bundle)
    for data in self_test_files():
        pixels = predictor.manifest.preprocess.load(data)[None]
        (probs,) = session.run(["probs"], {"images": pixels})
        assert np.allclose(probs, predictor.run(pixels).probs, atol=TOLERANCE)


def test_an_image_may_come_in_every_form(model: mlflow.pyfunc.PyFuncModel, bundle: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    data = png(pixels)
    file = tmp_path / "a.png"
    file.write_bytes(data)
    expected = dict(Predictor.load(bundle).predict(data, top_k=len(CLASSES)).labels)
    forms: list[tuple[Any, int]] = [
        (data, 1),
        (bytearray(data), 1),
        (text_of(data), 1),
        (f"data:image/png;base64,{text_of(data)}", 1),
        (str(file), 1),
        (file, 1),
        (pixels, 1),
        (pixels.tolist(), 1),
        (pixels.astype(np.int64), 1),
        ([data, text_of(data), file, pixels], 4),
        (np.stack([pixels, pixels]), 2),
        (np.array([str(file)] * 3, dtype=object), 3),
        (pd.DataFrame({"image": [data, str(file)]}), 2),
        (pd.DataFrame({"image": [data], "label": ["x"]}), 1),
        (pd.DataFrame([[data]]), 1),
        (pd.Series([data, data]), 2),
        ({"image": data}, 1),
        ({"image": [data, data]}, 2),
        ([{"image": data}], 1),
        ([data] * 40, 40),
    ]
    for given, n in forms:
        rows = model.predict(given).to_dict("records")
        assert len(rows) == n, type(given)
        for row in rows:
            assert probabilities(row) == pytest.approx(expected, abs=TOLERANCE), type(given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (17, "int is not an image"),
        ([17], "int is not an image"),
        (["no/such/file.jpg"], "neither base64 nor a file"),
        (np.zeros((4, 4), np.uint8), "shape"),
        (np.zeros((8, 8, 3), np.float32), "whole numbers from 0 to 255"),
        (np.full((8, 8, 3), 300), "whole numbers from 0 to 255"),
        (pd.DataFrame({"a": ["x"], "b": ["y"]}), "a column 'image'"),
        ({"picture": b""}, "the key 'image'"),
    ],
    ids=str,
)
def test_what_is_no_image_is_told_apart(model: mlflow.pyfunc.PyFuncModel, given: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        model.predict(given)


def test_what_cannot_be_decoded_is_an_error_of_its_own(model: mlflow.pyfunc.PyFuncModel) -> None:
    n_refused = 0
    for data, _ in REFUSED_FILES.values():
        with pytest.raises(ImageError):
            model.predict(data)
        n_refused += 1
    assert n_refused >= 5


def test_how_many_classes_are_given_is_a_param(model: mlflow.pyfunc.PyFuncModel) -> None:
    data = self_test_files()[0]
    assert [len(model.predict(data, {"top_k": k}).predictions[0]) for k in (1, 3, 5)] == [1, 3, 5]
    with pytest.raises(InvalidInput, match=f"from 1 to {len(CLASSES)}"):
        model.predict(data, {"top_k": len(CLASSES) + 1})
    with pytest.raises(MlflowException, match="top_k"):
        model.predict(data, {"top_k": "many"})


@pytest.mark.parametrize(
    "asked",
    [
        {"coverage": 0.9},
        {"coverage": 0.9, "per_class": True},
        {"abstain": True},
        {"abstain": True, "precision": 0.9, "coverage": 0.95},
    ],
    ids=str,
)
def test_what_predict_says_of_its_certainty_the_model_in_mlflow_says_too(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_bundle(tmp_path / "colours", calibration=CALIBRATION)
    write_model(tmp_path / "model", bundle)
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    monkeypatch.setitem(sys.modules, SCORING_SERVER, scoring_server)
    registered(tmp_path, bundle, "colours")
    said = ("prediction_set", "abstained", "reason", "novelty")
    with in_process(tmp_path) as client, TestClient(scoring_server.init(model)) as served:
        for colour in ("red", "blue"):
            answer = client.post("/predict", params=asked, content=picture(colour)).json()
            expected = {key: value for key, value in answer.items() if key in said and value is not None}
            assert expected
            request = {"inputs": [text_of(picture(colour))], "params": asked}
            for row in (
                model.predict(picture(colour), asked).to_dict("records")[0],
                served.post("/invocations", json=request).json()["predictions"][0],
            ):
                assert {key: value for key, value in row.items() if key in said and value is not None} == expected
    assert set(model.predict(picture("red")).columns) == {"label", "probability", "predictions"}
    with pytest.raises(InvalidInput, match="between"):
        model.predict(picture("red"), {"coverage": 2.0})


def test_a_server_opens_no_file_that_a_client_names(served: TestClient, tmp_path: Path) -> None:
    file = tmp_path / "secret.png"
    file.write_bytes(self_test_files()[0])
    answer = served.post("/invocations", json={"inputs": [str(file)]})
    assert answer.status_code == 400
    assert served.post("/invocations", json={"inputs": [text_of(file.read_bytes())]}).status_code == 200


def test_its_description_says_what_it_takes_and_gives(folder: Path, model: mlflow.pyfunc.PyFuncModel, served: TestClient) -> None:
    signature = model.metadata.signature
    assert [str(column.type) for column in signature.inputs.inputs] == ["DataType.string"]
    always = [column.name for column in signature.outputs.inputs if column.required]
    assert always == ["label", "probability", "predictions"]
    assert [param.name for param in signature.params.params] == ["top_k", "coverage", "per_class", "abstain", "precision"]
    assert set(model.metadata.flavors) == {"python_function", "onnx"}
    example = json.loads((folder / "serving_input_example.json").read_text())
    (row,) = served.post("/invocations", json=example).json()["predictions"]
    assert row["label"] in CLASSES
    requirements = (folder / "requirements.txt").read_text()
    assert "finetune-images==" in requirements
    assert "torch" not in requirements
    assert Predictor.load(folder).manifest.preprocess == PREPROCESS


def test_nothing_of_it_is_pickled(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {"MLmodel", "model.onnx", "bundle.json", "probe.npz"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".bin"))]


def test_it_answers_where_torch_cannot_be_imported(folder: Path, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(self_test_files()[1])
    program = f"""
import json, sys
for name in ("torch", "torchvision", "timm", "albumentations", "cv2"):
    sys.modules[name] = None
import mlflow
row = mlflow.pyfunc.load_model({str(folder)!r}).predict({str(file)!r}).iloc[0]
print(json.dumps([row.label, row.probability]))
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    label, probability = json.loads(done.stdout)
    expected = Predictor.load(bundle).predict(file.read_bytes()).labels[0]
    assert (label, probability) == (expected[0], pytest.approx(expected[1], abs=TOLERANCE))


@pytest.mark.slow
def test_mlflow_models_serve_answers_as_predict_does(folder: Path, bundle: Path, tmp_path: Path) -> None:
    """The real command, with what trains out of its reach."""
    blocked = tmp_path / "blocked"
    for name in ("torch", "timm", "albumentations"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('not on a serving machine')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(blocked), *sys.path])}
    command += ["--env-manager", "local"]
    server = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        until(lambda: _is_up(f"http://127.0.0.1:{port}/ping"), SECONDS)
        for data in self_test_files():
            answer = httpx.post(f"http://127.0.0.1:{port}/invocations", json={"inputs": [text_of(data)]}, timeout=SECONDS)
            (row,) = answer.json()["predictions"]
            expected = dict(Predictor.load(bundle).predict(data).labels)
            assert probabilities(row) == pytest.approx(expected, abs=TOLERANCE)
        file = tmp_path / "a.jpg"
        file.write_bytes(self_test_files()[1])
        answer = httpx.post(f"http://127.0.0.1:{port}/invocations", json={"inputs": [str(file)]}, timeout=SECONDS)
        assert answer.status_code == 400
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=SECONDS)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False
