"""Classifiers and pictures for the export tests: timm's own test architectures, seeded, with a head that has opinions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from folders import local_sample
from PIL import Image

from finetune.bundle.manifest import Manifest
from finetune.data.dataset import Sample
from finetune.export.graph import EXPORTER, DeployModule, Graph, evaluating, fill, head_of, trace
from finetune.export.pack import BundleFacts, ExportedNetwork, KeptWeights, export_bundle
from finetune.export.reference import torch_reference
from finetune.model.backbone import build_backbone
from finetune.model.classifier import Classifier
from finetune.runs.build import carried_tensors, facts_of
from finetune.runtime.session import INPUT_NAME, open_session

CLASSES = ("ash", "beech", "cedar", "elm")
FACTS = BundleFacts(
    name="trees", task="multiclass", classes=CLASSES, method={"type": "linear_probe"}, spec_digest="d" * 64, created_at=1.0
)


def classifier_of(
    architecture: str, *, input_size_px: int | Literal["auto"] = 64, num_classes: int = len(CLASSES), seed: int = 0
) -> Classifier:
    """Random weights in train mode, as a training loop would hand them over."""
    torch.manual_seed(seed)
    classifier = Classifier(build_backbone(architecture, weights="none", input_size_px=input_size_px), num_classes)
    scatter(classifier, seed)
    return classifier.train()


def network_of(module: DeployModule, graph: Graph | None = None) -> ExportedNetwork:
    """A classifier with its present weights, as it is shipped."""
    classifier = module.classifier
    return ExportedNetwork(
        model=fill(graph or trace(module), module),
        backbone=facts_of(classifier),
        preprocess=classifier.backbone.preprocess,
        exporter=EXPORTER,
        reference=lambda _, images: torch_reference(module, images),
        kept=KeptWeights(head_of(classifier), classifier.pooling, 0, carried_tensors(classifier.backbone, trained=True)),
    )


def export_classifier(
    classifier: Classifier, facts: BundleFacts, samples: Sequence[Sample], out: Path, *, graph: Graph | None = None, **given: Any
) -> Manifest:
    """Export a classifier as a run does."""
    module = DeployModule(classifier, facts.temperature, facts.task)
    return export_bundle(network_of(module, graph), facts, samples, out, **given)


def scatter(classifier: Classifier, seed: int) -> None:
    """Move every weight a little, as training does, and let batch norms and head fit what then comes out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.02 * (torch.rand(parameter.shape, generator=generator) - 0.5))
    _estimate_statistics(classifier)
    give_opinions(classifier, seed)


def give_opinions(classifier: Classifier, seed: int) -> None:
    """A random head whose logits are of order 1 and differ from image to image."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), evaluating(classifier):
        embedding = classifier.embed(_some_pictures(classifier))
        centre, spread = embedding.mean(0), (embedding - embedding.mean(0)).norm(dim=1).median()
        torch.nn.init.normal_(classifier.head.weight, std=2 / float(spread), generator=generator)
        classifier.head.bias.copy_(-classifier.head.weight @ centre)


def _estimate_statistics(classifier: Classifier) -> None:
    """Random layers under running statistics that do not fit them make activations of any size."""
    norms = [part for part in classifier.modules() if getattr(part, "running_var", None) is not None]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad(), evaluating(classifier):
        for norm in norms:
            # Most units open. With half of them shut, a deep random network without shortcuts is chaotic: in Inception v4 a
            # relative change of 1e-7 in the input moved logits by 2.5e-3, so that float32 itself was no reference to 1e-4.
            norm.bias += 1
            norm.momentum = 1.0
            norm.training = True
        classifier.embed(_some_pictures(classifier))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def picture(number: int) -> Image.Image:
    """Noise, of a size of grain that goes with the number."""
    grain = np.random.default_rng(number).integers(0, 256, (2 + 3 * (number % 8), 2 + 2 * (number % 8), 3), dtype=np.uint8)
    return Image.fromarray(grain).resize((112, 96), Image.Resampling.NEAREST)


def pictures(folder: Path, count: int = 9) -> list[Sample]:
    """The first pictures as PNG files, labelled in turn."""
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
    return [local_sample(folder / f"{number}.png", number % len(CLASSES), "val") for number in range(count)]


def _some_pictures(classifier: Classifier) -> torch.Tensor:
    """(16, 3, h, w) float32, normalised."""
    preprocess = classifier.backbone.preprocess
    return classifier.normalise(torch.from_numpy(np.stack([preprocess(np.asarray(picture(number))) for number in range(16)])))


def torch_answers(module: DeployModule, images: np.ndarray) -> dict[str, np.ndarray]:
    with evaluating(module), torch.no_grad():
        outputs = module(torch.from_numpy(images))
    return dict(zip(module.outputs, (output.numpy() for output in outputs), strict=True))


def exact_logits(module: DeployModule, images: np.ndarray) -> np.ndarray:
    """(B, C) float64: the referee when torch and ONNX differ in float32. The images are normalised in float32, as both do."""
    normalised = module.classifier.normalise(torch.from_numpy(images)).double()
    exact = copy.deepcopy(module.classifier).double()
    with evaluating(exact), torch.no_grad():
        logits, _, _ = exact.explain(normalised)
    return logits.numpy()


def onnx_answers(model: bytes, images: np.ndarray) -> dict[str, np.ndarray]:
    session = open_session(model)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {INPUT_NAME: images}), strict=True))
