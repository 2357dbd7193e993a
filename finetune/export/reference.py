"""Compute the outputs of a torch module, which an export is compared with."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.bundle.predictor import Outputs
from finetune.export.agreement import Reference, joined
from finetune.export.graph import DeployModule, evaluating, head_of

_BATCH = 32


def torch_reference(module: DeployModule, images: NDArray[np.uint8]) -> Reference:
    """Return the outputs of `module` for images (N, h, w, 3) uint8 as a reference."""
    source = f"torch {torch.__version__} in the process that exported"
    return Reference(torch_outputs(module, images), head_of(module.classifier).bias, source)


def torch_outputs(module: DeployModule, images: NDArray[np.uint8]) -> Outputs:
    """Run `module` in eval mode on images (N, h, w, 3) uint8; return its outputs."""
    parts = []
    with evaluating(module), torch.no_grad():
        for start in range(0, len(images), _BATCH):
            batch = torch.from_numpy(images[start : start + _BATCH]).to(module.temperature.device)
            values = (output.cpu().numpy() for output in module(batch))
            parts.append(Outputs(**{"cam": None, **dict(zip(module.outputs, values, strict=True))}))
    return joined(parts)
