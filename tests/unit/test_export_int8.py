"""int8 on request: smaller, exact where it must be, and kept only where it is as good."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exporting import FACTS, classifier_of, export_classifier, onnx_answers, picture
from folders import local_sample, path_of

from finetune.bundle.manifest import MODEL
from finetune.bundle.predictor import Predictor
from finetune.data.dataset import Sample
from finetune.export import quantize as quantize_module
from finetune.export.graph import DeployModule, Graph, fill, trace
from finetune.export.quantize import quantize
from finetune.model.classifier import Classifier

N_PICTURES = 48


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return classifier_of("test_resnet")


@pytest.fixture(scope="module")
def graph(classifier: Classifier) -> Graph:
    return trace(DeployModule(classifier))


@pytest.fixture(scope="module")
def model(classifier: Classifier, graph: Graph) -> bytes:
    return fill(graph, DeployModule(classifier))


@pytest.fixture(scope="module")
def images(classifier: Classifier) -> np.ndarray:
    return np.stack([classifier.backbone.preprocess(np.asarray(picture(number))) for number in range(N_PICTURES)])


@pytest.fixture(scope="module")
def int8(model: bytes, images: np.ndarray) -> bytes:
    return quantize(model, images)


@pytest.fixture(scope="module")
def sure(model: bytes, images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """The pictures that the float32 model is surest of, labelled as it sees them."""
    logits = onnx_answers(model, images)["logits"]
    margins = np.diff(np.sort(logits, axis=1)[:, -2:], axis=1)[:, 0]
    folder = tmp_path_factory.mktemp("sure")
    samples = []
    for number in np.argsort(-margins)[:12]:
        picture(int(number)).save(folder / f"{number}.png")
        samples.append(local_sample(folder / f"{number}.png", int(logits[number].argmax()), "val"))
    return samples


def test_convolutions_are_int8_and_the_head_is_not(int8: bytes) -> None:
    proto = onnx.load_model_from_string(int8)
    onnx.checker.check_model(proto)
    made_by = {output: node.op_type for node in proto.graph.node for output in node.output}
    inputs = {op: [made_by.get(node.input[1]) for node in proto.graph.node if node.op_type == op] for op in ("Conv", "Gemm")}
    assert set(inputs["Conv"]) == {"DequantizeLinear"}
    assert inputs["Gemm"] == [None]  # its weights are a plain float32 initialiser


def test_int8_answers_nearly_as_float32_and_is_a_third_of_its_size(model: bytes, int8: bytes, images: np.ndarray) -> None:
    expected, given = onnx_answers(model, images), onnx_answers(int8, images)
    best, second = np.sort(expected["logits"], axis=1)[:, :-3:-1].T
    clear = best - second > np.median(best - second)  # a random network is undecided about the others
    assert (expected["logits"].argmax(1) == given["logits"].argmax(1))[clear].all()
    cosine = (expected["embedding"] * given["embedding"]).sum(1)
    cosine /= np.linalg.norm(expected["embedding"], axis=1) * np.linalg.norm(given["embedding"], axis=1)
    assert 0.97 < cosine.min() < 0.9999
    assert len(int8) < len(model) / 2.5


def test_the_map_of_an_int8_model_still_averages_to_its_logit(classifier: Classifier, int8: bytes, images: np.ndarray) -> None:
    given = onnx_answers(int8, images)
    bias = classifier.head.bias.detach().numpy()[given["logits"].argmax(1)]
    np.testing.assert_allclose(given["cam"].mean((1, 2)) + bias, given["logits"].max(1), atol=1e-4)


def test_a_bundle_is_int8_where_that_answers_as_well(
    classifier: Classifier,
    graph: Graph,
    model: bytes,
    sure: list[Sample],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    manifest = export_classifier(classifier, FACTS, sure, tmp_path / "bundle", graph=graph, quantize="int8", training=sure)
    said = manifest.model["quantization"]
    assert (said["kept"], said["metric"], said["float32"], said["int8"], said["n_images"]) == (True, "top1", 1.0, 1.0, 12)
    assert said["sentence"].startswith("quantised to int8: top1 on 12 images is 1.0000, in float32 1.0000; ")
    assert (tmp_path / "bundle" / MODEL).stat().st_size < len(model) / 2.5
    predictor = Predictor.load(tmp_path / "bundle")
    assert {predictor.predict(path_of(sample).read_bytes()).labels[0][0] for sample in sure} <= set(FACTS.classes)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_bundle_stays_float32_where_int8_costs_too_much_and_says_so(
    classifier: Classifier, graph: Graph, model: bytes, sure: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_module, "MAX_LOSS", -0.01)  # it would have to be better
    manifest = export_classifier(classifier, FACTS, sure, tmp_path / "bundle", graph=graph, quantize="int8")
    said = manifest.model["quantization"]
    assert not said["kept"]
    assert said["sentence"].startswith("not quantised, the model stays float32: in int8 top1 on 12 images is")
    assert "logits_tolerance" not in manifest.model
    assert (tmp_path / "bundle" / MODEL).stat().st_size > len(model)
