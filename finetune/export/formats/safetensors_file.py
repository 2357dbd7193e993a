"""The format ``safetensors``: backbone and head in one file, which can be used as ``model.weights`` of a job spec.

The backbone's tensors have timm's names with the prefix ``backbone.``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch

from finetune.bundle.weights import BACKBONE, HEAD_BIAS, HEAD_WEIGHT
from finetune.storage.files import atomic_path

if TYPE_CHECKING:
    from finetune.export.formats.bundle import Opened

FILE = "model.safetensors"


def write(opened: Opened, folder: Path) -> str:
    """Write ``model.safetensors`` with the manifest in its metadata."""
    classifier = opened.classifier
    tensors = {f"{BACKBONE}{name}": tensor for name, tensor in classifier.backbone.module.state_dict().items()}
    tensors |= {HEAD_WEIGHT: classifier.head.weight.detach(), HEAD_BIAS: classifier.head.bias.detach()}
    manifest = json.dumps(opened.manifest.to_dict(), ensure_ascii=False, sort_keys=True)
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(folder / FILE) as temporary:
        safetensors.torch.save_file(contiguous, temporary, {"format": "pt", "finetune": manifest})
    return (
        f"{len(tensors)} tensors, the backbone's under timm's names behind {BACKBONE}; model.weights of a job spec takes {FILE}"
    )
