"""Classifiers and pictures for the export tests: timm's own test architectures, seeded, with a head that has opinions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from finetune.data.index import Sample
from finetune.export import BundleFacts
from finetune.export.graph import INPUT_NAME, DeployModule, evaluating, open_session
from finetune.model.backbone import build_backbone
from finetune.model.classifier import Classifier

CLASSES = ("ash", "beech", "cedar", "elm")
FACTS = BundleFacts(name="trees", classes=CLASSES, method={"type": "linear_probe"}, spec_digest="d" * 64, created_at=1.0)


def classifier_of(architecture: str, *, input_size_px: int = 64, num_classes: int = len(CLASSES), seed: int = 0) -> Classifier:
    """In train mode, as a training loop would hand it over."""
    torch.manual_seed(seed)
    classifier = Classifier(build_backbone(architecture, weights="none", input_size_px=input_size_px), num_classes)
    scatter(classifier, seed)
    return classifier.train()


def scatter(classifier: Classifier, seed: int) -> None:
    """Move every weight and every running statistic, as training does, and give the head logits of order 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*classifier.named_parameters(), *classifier.named_buffers()]:
            if tensor.is_floating_point() and not name.startswith("_"):
                tensor.add_(0.02 * torch.rand(tensor.shape, generator=generator))
        height, width = classifier.backbone.preprocess.input_size_px
        images = torch.rand((4, 3, height, width), generator=generator) * 4 - 2
        with evaluating(classifier):
            embedding = classifier.embed(images)
        torch.nn.init.normal_(classifier.head.weight, std=float(2 / embedding.norm(dim=1).mean()), generator=generator)
        torch.nn.init.normal_(classifier.head.bias, std=0.5, generator=generator)


def pictures(folder: Path, count: int = 9) -> list[Sample]:
    """PNG files of coarse noise, each class with a tint of its own."""
    samples = []
    for number in range(count):
        rng = np.random.default_rng(number)
        label = number * len(CLASSES) // count
        coarse = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        coarse[..., label % 3] //= 3
        path = folder / f"{number}.png"
        Image.fromarray(coarse).resize((112, 96), Image.Resampling.BICUBIC).save(path)
        samples.append(Sample(path, label, "val"))
    return samples


def torch_answers(module: DeployModule, images: np.ndarray) -> dict[str, np.ndarray]:
    with evaluating(module), torch.no_grad():
        outputs = module(torch.from_numpy(images))
    return dict(zip(module.outputs, (output.numpy() for output in outputs), strict=True))


def onnx_answers(model: bytes, images: np.ndarray) -> dict[str, np.ndarray]:
    session = open_session(model)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {INPUT_NAME: images}), strict=True))
