"""The format ``timm``: a folder for ``timm.create_model("local-dir:FOLDER", pretrained=True)``, with the head as classifier.

timm's networks differ in the pooling before their classifier. The arguments with which a network pools like the bundle's are
found by trial, and the written folder is loaded again and compared with the bundle.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from timm.models import save_for_hf
from torch import nn

from finetune.bundle.card import model_card
from finetune.bundle.manifest import CARD
from finetune.errors import InvalidInput
from finetune.export.formats.bundle import LOGITS_TOLERANCE, check_logits
from finetune.storage.files import write_atomic

if TYPE_CHECKING:
    from finetune.export.formats.bundle import Opened
    from finetune.model.classifier import Classifier

_CROP_MODES = {"crop": "center", "squash": "squash", "letterbox": "border"}  # ours → timm's
USE = """```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # FOLDER: where this file lies
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
logits = model(transform(picture)[None])  # divide by the temperature in config.json before a softmax (several labels: sigmoid)
```

timm resizes in two steps and rounds between them, so its answers to image files differ a little from the bundle's; on the same
pixels the logits agree to 1e-4."""


def write(opened: Opened, folder: Path) -> str:
    """Write ``config.json``, ``model.safetensors`` and a model card.

    Raises:
        InvalidInput: no arguments make timm's network pool like the bundle's.
        ExportError: timm computes other logits from the written folder.
    """
    classifier, manifest = opened.classifier, opened.manifest
    images = _normalised(classifier, opened.images)
    with torch.no_grad():
        expected = classifier(images).numpy()
    model = _equal_model(classifier, images, expected)
    if model is None:
        raise InvalidInput(
            f"{manifest.backbone['name']} with pooling {classifier.pooling!r} cannot be written for timm: no arguments of timm's "
            "make its network pool in this way before the classifier. --format safetensors or onnx keeps everything"
        )
    preprocess, licence = manifest.preprocess, (manifest.backbone.get("weights") or {}).get("license")
    save_for_hf(
        model,
        str(folder),
        model_config={
            "label_names": list(manifest.classes),
            "finetune": {"model": manifest.name, "version": manifest.version, "temperature": _temperature(opened)},
            "pretrained_cfg": {"license": licence} if licence else {},
        },
        safe_serialization=True,
        data_config={
            "input_size": (3, *preprocess.input_size_px),
            "mean": preprocess.mean,
            "std": preprocess.std,
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_fraction,
            "crop_mode": _CROP_MODES[preprocess.resize],
        },
    )
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        check_logits("the weights in the written folder, loaded by timm,", again(images).numpy(), expected)
    card = model_card(manifest, library="timm", use=USE)
    write_atomic(folder / CARD, lambda stream: stream.write(card.encode()))
    return "timm.create_model('local-dir:FOLDER', pretrained=True) loads the folder"


def _normalised(classifier: Classifier, images: NDArray[np.uint8]) -> torch.Tensor:
    return classifier.normalise(torch.from_numpy(images))


def _temperature(opened: Opened) -> float:
    return float(opened.manifest.calibration.get("temperature", 1.0))


def _equal_model(classifier: Classifier, images: torch.Tensor, expected: NDArray[np.float32]) -> nn.Module | None:
    """Return timm's network, with a classifier, that computes the same logits as `classifier`; None if there is none."""
    for model in _candidates(classifier):
        if not _take_weights(model, classifier):
            continue
        with torch.no_grad():
            logits = model.eval()(images).numpy()
        if np.abs(logits - expected).max() <= LOGITS_TOLERANCE * max(1.0, float(np.abs(expected).max())):
            return model
    return None


def _candidates(classifier: Classifier) -> Iterator[nn.Module]:
    """Yield timm's network with its own pooling, then with other kinds of pooling that it supports."""
    backbone = classifier.backbone
    cfg = backbone.weights.pretrained_cfg
    options: dict[str, Any] = dict(cfg.get("model_args", {}))
    height, width = backbone.preprocess.input_size_px
    if cfg.get("fixed_input_size") and (height, width) != tuple(cfg["input_size"][1:]):
        options["img_size"] = height if height == width else (height, width)
    pool = {"global_pool": classifier.pooling}
    for arguments in ({}, pool, {**pool, "fc_norm": False}, {**pool, "fc_norm": False, "final_norm": True}):
        try:
            wanted = {**options, **arguments, "num_classes": classifier.num_classes}
            yield timm.create_model(cfg["architecture"], pretrained=False, **wanted)
        except (TypeError, AssertionError, ValueError, RuntimeError, KeyError):
            continue  # this family does not have such an argument


def _take_weights(model: nn.Module, classifier: Classifier) -> bool:
    """Copy the weights of backbone and head into timm's network; return False if a tensor has no counterpart in it."""
    own, layer = model.state_dict(), _linear(model)
    if layer is None or layer.weight.shape[:2] != classifier.head.weight.shape:
        return False
    of_backbone = classifier.backbone.module.state_dict()
    if any(name not in own or own[name].shape != tensor.shape for name, tensor in of_backbone.items()):
        return False
    model.load_state_dict({**own, **of_backbone})
    with torch.no_grad():
        layer.weight.copy_(classifier.head.weight.view_as(layer.weight))
        assert layer.bias is not None
        layer.bias.copy_(classifier.head.bias)
    return True


def _linear(model: nn.Module) -> nn.Linear | nn.Conv2d | None:
    """Return timm's classifier if it is a single linear layer (or 1×1 convolution) with a bias; else None."""
    found = model.get_classifier()  # type: ignore[operator]
    is_linear = isinstance(found, nn.Linear) or (isinstance(found, nn.Conv2d) and found.kernel_size == (1, 1))
    return found if is_linear and found.bias is not None else None
