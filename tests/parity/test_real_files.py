"""One file, three roads to an answer: torch evaluation, the ONNX graph, and a server's bytes. They must not differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from awkward import READABLE_FILES, REFUSED_FILES
from exporting import CLASSES, FACTS, export_classifier, give_opinions, pictures, torch_answers

from finetune.bundle.predictor import Predictor
from finetune.errors import ImageError
from finetune.export.dry_run import dry_run_export
from finetune.export.graph import DeployModule
from finetune.model.backbone import build_backbone
from finetune.model.classifier import Classifier
from finetune.spec import DEFAULT_BACKBONE

TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def deployed() -> DeployModule:
    """The default backbone with its pretrained weights, and a head that tells these files apart."""
    classifier = Classifier(build_backbone(DEFAULT_BACKBONE), len(CLASSES))
    give_opinions(classifier, seed=0)
    return DeployModule(classifier)


@pytest.fixture(scope="module")
def predictor(deployed: DeployModule, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("exported")
    export_classifier(deployed.classifier, FACTS, pictures(folder), folder / "bundle", graph=dry_run_export(deployed.classifier))
    return Predictor.load(folder / "bundle")


def assert_all_roads_agree(files: list[Path], deployed: DeployModule, predictor: Predictor) -> None:
    preprocess = deployed.classifier.backbone.preprocess
    images = np.stack([preprocess.load_file(file) for file in files])  # (N, h, w, 3) uint8
    expected = torch_answers(deployed, images)
    batched = predictor.run(images)
    bias = deployed.classifier.head.bias.detach().numpy()
    assert len(set(expected["logits"].argmax(1))) > 1  # one answer for everything would prove nothing
    np.testing.assert_allclose(batched.probs, expected["probs"], atol=TOLERANCE)
    np.testing.assert_array_equal(batched.logits.argmax(1), expected["logits"].argmax(1))
    for file, logits, probs in zip(files, expected["logits"], expected["probs"], strict=True):
        prediction = predictor.predict(file.read_bytes(), top_k=len(CLASSES))
        given = np.array([dict(prediction.labels)[name] for name in CLASSES])
        np.testing.assert_allclose(given, probs, atol=TOLERANCE, err_msg=file.name)
        assert prediction.labels[0][0] == CLASSES[logits.argmax()], file.name
        assert prediction.cam is not None
        assert prediction.cam.mean() + bias[logits.argmax()] == pytest.approx(logits.max(), abs=TOLERANCE), file.name


def test_photographs_get_one_answer_on_every_road(photos: Path, deployed: DeployModule, predictor: Predictor) -> None:
    found = sorted(path for path in (photos / "validation").rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    chosen = found[:: len(found) // 12][:12]
    assert len(chosen) == 12
    assert_all_roads_agree(chosen, deployed, predictor)


def test_awkward_files_get_one_answer_on_every_road(tmp_path: Path, deployed: DeployModule, predictor: Predictor) -> None:
    for name, (data, _) in READABLE_FILES.items():
        (tmp_path / name).write_bytes(data)
    files = sorted(tmp_path.iterdir())
    assert len(files) == len(READABLE_FILES) > 20
    assert_all_roads_agree(files, deployed, predictor)


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_what_evaluation_refuses_serving_refuses_alike(
    name: str, tmp_path: Path, deployed: DeployModule, predictor: Predictor
) -> None:
    data, expectation = REFUSED_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError) as evaluating:
        deployed.classifier.backbone.preprocess.load_file(tmp_path / name)
    with pytest.raises(ImageError) as serving:
        predictor.predict(data)
    assert type(evaluating.value) is type(serving.value) is expectation.error
    assert evaluating.value.message.endswith(serving.value.message)
