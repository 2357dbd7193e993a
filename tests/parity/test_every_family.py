"""Every family of backbones × every method: build, freeze, take a step, export, and say the same as torch on files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import FACTS, classifier_of, exact_logits, export_classifier, pictures, torch_answers
from folders import path_of
from torch.nn import functional

from finetune.bundle.predictor import Predictor
from finetune.data.dataset import Sample
from finetune.export.dry_run import dry_run_export
from finetune.export.graph import DeployModule
from finetune.model.classifier import Classifier
from finetune.model.freeze import apply_freeze, frozen_digest, parameter_groups
from finetune.model.selection import plan_freeze
from finetune.spec import Full, LinearProbe, Method, Partial

# Side of the input, small where the network takes any, and whether its class activation map is exact.
FAMILIES: dict[str, tuple[int | str, str | None]] = {
    "resnet18": (96, "linear"),
    "resnet50": (96, "linear"),
    "vgg16": (96, "linear"),
    "vgg16_bn": (96, "linear"),
    "inception_v3": (160, "linear"),
    "inception_v4": (160, "linear"),
    "densenet121": (96, "linear"),
    "efficientnet_b0": (96, "linear"),
    "tf_efficientnet_lite0": (96, "linear"),
    "mobilenetv3_large_100": (96, None),
    "regnetx_002": (96, "linear"),
    "regnety_002": (96, "linear"),
    "convnext_tiny": (96, "layernorm"),
    "vit_tiny_patch16_224": (96, "linear"),
    "swin_tiny_patch4_window7_224": ("auto", "linear"),
    "levit_128s": ("auto", "linear"),
}
METHODS = ("linear_probe", "partial by number", "partial by name", "full")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each family's graph is kept from one method to the next."""
    return tmp_path_factory.mktemp("graphs")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_and_exports_faithfully(
    name: str, method: str, graphs: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    size_px, cam_kind = FAMILIES[name]
    classifier = classifier_of(name, input_size_px=size_px)  # type: ignore[arg-type]
    assert classifier.cam_kind == cam_kind
    graph = dry_run_export(classifier, cache=graphs)
    apply_freeze(classifier, plan_freeze(classifier.backbone.stages, asked(classifier, method)))
    frozen = frozen_digest(classifier)
    n_moved = take_a_step(classifier)

    samples = pictures(tmp_path, 5)
    manifest = export_classifier(classifier, FACTS, samples, tmp_path / "bundle", graph=graph)
    from_onnx, from_torch = errors_against_float64(classifier, Predictor.load(tmp_path / "bundle"), samples)

    assert frozen_digest(classifier) == frozen
    assert n_moved == sum(len(group.parameters) for group in parameter_groups(classifier))
    assert manifest.cam["kind"] == cam_kind
    assert manifest.parity["max_prob_difference"] <= 1e-4
    assert manifest.parity["n_flips"] == manifest.parity["n_flips_from_bytes"] == 0
    assert from_onnx <= 10 * from_torch + 1e-5  # about as exact as torch: a wrong graph would be off by 1e-2 and more
    for figure in ("max_prob_difference", "max_logit_difference", "max_cam_error", "min_embedding_cosine"):
        record_property(figure, manifest.parity[figure])
    record_property("logit_error_of_onnx", from_onnx)
    record_property("logit_error_of_torch", from_torch)


def asked(classifier: Classifier, method: str) -> Method:
    """The method as a spec has it; by name it is the two last stages, given the wrong way round."""
    stages = classifier.backbone.stages
    choices: dict[str, Method] = {
        "linear_probe": LinearProbe(),
        "partial by number": Partial(stages=1),
        "partial by name": Partial(train=(stages[-1].name, stages[-2].name)),
        "full": Full(bn="train"),
    }
    return choices[method]


def take_a_step(classifier: Classifier) -> int:
    """One step of AdamW on noise; how many parameters it moved."""
    parameters = [parameter for group in parameter_groups(classifier) for parameter in group.parameters.values()]
    before = [parameter.detach().clone() for parameter in parameters]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    height, width = classifier.backbone.preprocess.input_size_px
    images = torch.rand((4, 3, height, width), generator=torch.Generator().manual_seed(1)) * 4 - 2
    classifier.train()
    functional.cross_entropy(classifier(images), torch.arange(4)).backward()
    optimiser.step()
    return sum(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))


def errors_against_float64(classifier: Classifier, predictor: Predictor, samples: list[Sample]) -> tuple[float, float]:
    """The largest logit error of ONNX, and of torch in float32, measured against the same network in float64."""
    module = DeployModule(classifier)
    images = np.stack([classifier.backbone.preprocess.load_file(path_of(sample)) for sample in samples])
    exact = exact_logits(module, images)
    answers = (predictor.run(images).logits, torch_answers(module, images)["logits"])
    from_onnx, from_torch = (float(np.abs(answer - exact).max()) for answer in answers)
    return from_onnx, from_torch
