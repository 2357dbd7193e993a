"""The bundle that an export writes, what it says about itself, and the comparisons that it must pass before it counts."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exporting import CLASSES, FACTS, classifier_of, export_classifier, network_of, pictures, scatter
from folders import path_of

from finetune.bundle.manifest import MODEL, read_manifest
from finetune.bundle.predictor import Predictor, read_self_test
from finetune.data.dataset import Sample
from finetune.errors import ExportError
from finetune.export import agreement
from finetune.export.agreement import Parity, Reference, batch_sizes_for, parity
from finetune.export.graph import DeployModule, Graph, trace
from finetune.export.pack import _manifest, export_bundle
from finetune.export.reference import torch_reference
from finetune.model.classifier import Classifier
from finetune.runtime.session import open_session
from finetune.storage.files import sha256_file


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
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def bundle(classifier: Classifier, graph: Graph, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "bundle"
    facts = dataclasses.replace(FACTS, metrics={"val/top1": 0.5}, calibration={"temperature": 1.5}, frozen={"stages": ["stem"]})
    export_classifier(classifier, facts, samples, out, graph=graph)
    return out


def test_an_exported_bundle_answers_what_the_classifier_answers(
    bundle: Path, classifier: Classifier, samples: list[Sample]
) -> None:
    predictor = Predictor.load(bundle)
    images = np.stack([classifier.backbone.preprocess.load_file(path_of(sample)) for sample in samples])
    classifier.eval()
    with torch.no_grad():
        logits = classifier(classifier.normalise(torch.from_numpy(images)))
    np.testing.assert_allclose(predictor.run(images).logits, logits.numpy(), atol=5e-5)
    for sample, row in zip(samples, torch.softmax(logits / 1.5, dim=1).numpy(), strict=True):
        prediction = predictor.predict(path_of(sample).read_bytes(), top_k=len(CLASSES))
        assert prediction.labels[0][0] == CLASSES[row.argmax()]
        assert dict(prediction.labels) == pytest.approx(dict(zip(CLASSES, row.tolist(), strict=True)), abs=1e-5)


def test_a_bundle_is_files_with_checksums_that_anybody_may_read(bundle: Path) -> None:
    listed = ["README.md", "model.onnx", "probe.npz", "weights.safetensors"]
    assert sorted(path.name for path in bundle.iterdir()) == sorted([*listed, "bundle.json"])
    assert read_manifest(bundle).files == {name: sha256_file(bundle / name) for name in listed}
    assert {path.stat().st_mode & 0o777 for path in bundle.iterdir()} == {0o644}
    assert bundle.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_the_manifest_says_what_was_exported_and_how_well_it_matches(bundle: Path, samples: list[Sample]) -> None:
    manifest = read_manifest(bundle)
    assert (manifest.name, manifest.classes, manifest.spec_digest) == ("trees", CLASSES, "d" * 64)
    assert manifest.backbone["name"] == "test_resnet"
    assert manifest.backbone["weights"]["source"] == "none"
    assert manifest.outputs == ("probs", "logits", "cam", "embedding")
    assert (manifest.cam["available"], manifest.cam["kind"]) == (True, "linear")
    assert (manifest.metrics, manifest.calibration, manifest.frozen) == (
        {"val/top1": 0.5},
        {"temperature": 1.5},
        {"stages": ["stem"]},
    )
    assert manifest.model["opset"] == 20
    assert manifest.versions["torch"] == torch.__version__.partition("+")[0]
    assert manifest.parity["n_images"] == len(samples)
    assert manifest.parity["batch_sizes"] == [1, 2, 7, 32]
    assert manifest.parity["n_flips"] == 0
    assert 0 < manifest.parity["max_logit_difference"] < 1e-4


def test_a_lone_model_file_explains_itself(bundle: Path) -> None:
    said = {entry.key: json.loads(entry.value) for entry in onnx.load(bundle / MODEL).metadata_props}
    manifest = read_manifest(bundle).to_dict()
    assert said == {f"finetune.{key}": manifest[key] for key in manifest if key not in ("name", "version", "files", "abstain")}
    assert said["finetune.classes"] == list(CLASSES)


def test_the_self_test_holds_real_files(bundle: Path, samples: list[Sample]) -> None:
    encoded = {path_of(sample).read_bytes() for sample in samples}
    known = read_self_test(bundle / "probe.npz")
    assert len(known.encoded) == 3
    assert set(known.encoded) <= encoded


def test_the_same_classifier_exports_to_the_same_model(
    bundle: Path, classifier: Classifier, samples: list[Sample], tmp_path: Path
) -> None:
    facts = dataclasses.replace(FACTS, metrics={"val/top1": 0.5}, calibration={"temperature": 1.5}, frozen={"stages": ["stem"]})
    again = export_classifier(classifier, facts, samples, tmp_path / "bundle")  # traced anew
    assert again == read_manifest(bundle)


def test_an_export_that_differs_from_torch_leaves_what_was_there(
    bundle: Path, classifier: Classifier, graph: Graph, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_manifest(bundle)
    monkeypatch.setattr(agreement, "PROB_TOLERANCE", 0.0)
    with pytest.raises(
        ExportError, match="test_resnet: the exported model does not give the predictions of the trained one"
    ) as raised:
        export_classifier(classifier, FACTS, samples, bundle, graph=graph)
    assert [problem.where for problem in raised.value.problems] == ["training against ONNX", "training against bytes"]
    assert read_manifest(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_new_export_replaces_the_old_bundle(
    classifier: Classifier, graph: Graph, samples: list[Sample], tmp_path: Path
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "left_over").write_text("half an export")
    export_classifier(classifier, FACTS, samples[:1], tmp_path / "bundle", graph=graph)
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == [
        "README.md",
        "bundle.json",
        "model.onnx",
        "probe.npz",
        "weights.safetensors",
    ]


def test_an_export_without_images_to_check_it_on_is_refused(classifier: Classifier, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="pass validation samples"):
        export_classifier(classifier, FACTS, [], tmp_path / "bundle")


@pytest.fixture(scope="module")
def compared(classifier: Classifier, graph: Graph) -> tuple[DeployModule, Predictor]:
    module = DeployModule(classifier)
    network = network_of(module, graph)
    return module, Predictor(_manifest(network, FACTS), open_session(network.model))


@pytest.mark.parametrize("agrees", [True, False])
def test_only_an_export_that_agrees_is_recorded(
    classifier: Classifier, graph: Graph, samples: list[Sample], tmp_path: Path, agrees: bool
) -> None:
    network = network_of(DeployModule(classifier), graph)
    recorded: list[str] = []

    def reference(compared: Sequence[Sample], images: np.ndarray) -> Reference:
        found = network.reference(compared, images)
        logits = found.outputs.logits if agrees else -found.outputs.logits
        outputs = dataclasses.replace(found.outputs, logits=logits)
        return dataclasses.replace(found, outputs=outputs, when_agreed=lambda: recorded.append("the network"))

    with contextlib.nullcontext() if agrees else pytest.raises(ExportError):
        export_bundle(dataclasses.replace(network, reference=reference), FACTS, samples, tmp_path / "bundle")
    assert recorded == (["the network"] if agrees else [])


def report_of(compared: tuple[DeployModule, Predictor], samples: list[Sample], **given: int) -> Parity:
    module, predictor = compared
    files = [sample.read() for sample in samples]
    images = np.stack([module.classifier.backbone.preprocess.load(data) for data in files])
    return parity(torch_reference(module, images), images, predictor, files, **given)


def test_a_faithful_model_has_no_problems(compared: tuple[DeployModule, Predictor], samples: list[Sample]) -> None:
    report = report_of(compared, samples)
    assert report.problems() == []
    assert report.min_embedding_cosine == pytest.approx(1)


def test_other_weights_are_found_out(compared: tuple[DeployModule, Predictor], samples: list[Sample]) -> None:
    module, predictor = compared
    other = copy.deepcopy(module)
    scatter(other.classifier, seed=3)
    report = report_of((other, predictor), samples)
    assert report.n_flips > 0
    assert {problem.where for problem in report.problems()} == {"training against ONNX", "training against bytes", "cam"}


def test_another_preprocessing_is_found_out_by_sending_files(
    compared: tuple[DeployModule, Predictor], samples: list[Sample]
) -> None:
    module, predictor = compared
    otherwise = dataclasses.replace(predictor.manifest.preprocess, interpolation="nearest")
    drifted = Predictor(dataclasses.replace(predictor.manifest, preprocess=otherwise), predictor._session)
    report = report_of((module, drifted), samples)
    assert {problem.where for problem in report.problems()} == {"training against bytes"}


def test_nan_is_over_every_tolerance(compared: tuple[DeployModule, Predictor], samples: list[Sample]) -> None:
    module, predictor = compared
    broken = copy.deepcopy(module)
    with torch.no_grad():
        broken.classifier.head.weight[0, 0] = torch.nan
    assert len(report_of((broken, predictor), samples).problems()) >= 2


def test_a_tie_in_torch_is_not_a_flip() -> None:
    logits = np.array([[1.0, 1.00005, 0.0], [1.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    assert agreement._flips(logits, logits, np.array([0, 0, 0])) == (1, 1)


def test_labels_that_are_as_probable_as_can_be_are_tied() -> None:
    """Of several labels that an image surely has, each has a probability of exactly 1, and which comes first is no flip."""
    logits = np.array([[30.0, 40.0, -5.0], [30.0, 40.0, 3.0]], np.float32)
    probs = np.array([[1.0, 1.0, 0.01], [1.0, 1.0, 0.95]], np.float32)
    assert agreement._flips(logits, probs, np.array([0, 2])) == (1, 1)


def test_more_images_than_the_batches_hold_are_all_compared(
    compared: tuple[DeployModule, Predictor], samples: list[Sample]
) -> None:
    many = report_of(compared, samples * 8, n_from_bytes=2)
    assert many.n_images == 72
    assert many.n_from_bytes == 2


@pytest.mark.parametrize(
    ("side_px", "sizes"), [(64, (1, 2, 7, 32)), (384, (1, 2, 7, 32)), (640, (1, 2, 7)), (1024, (1, 2)), (8192, (1, 2))]
)
def test_larger_images_are_compared_in_smaller_batches(side_px: int, sizes: tuple[int, ...]) -> None:
    assert batch_sizes_for(side_px, side_px) == sizes
