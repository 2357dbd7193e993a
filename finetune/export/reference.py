"""Compute the outputs of a torch module, which an export is compared with."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.bundle.predictor import Outputs
from finetune.export.agreement import Reference, batch_sizes_for, joined
from finetune.export.graph import DeployModule, evaluating, head_of
from finetune.export.template import Head
from finetune.training.objectives import objective_of

_COMPUTED_BY = f"torch {torch.__version__} in the process that exported"


def torch_reference(module: DeployModule, images: NDArray[np.uint8]) -> Reference:
    """Return the outputs of `module` for images (N, h, w, 3) uint8 as a reference."""
    return Reference(torch_outputs(module, images), head_of(module.classifier).bias, _COMPUTED_BY)


def head_reference(embeddings: NDArray[np.float32], head: Head, temperature: float, task: str) -> Reference:
    """Return torch's outputs of a head on embeddings (N, D), which torch has computed before, as a reference."""
    with torch.no_grad():
        weight, bias, values = (torch.from_numpy(array) for array in (head.weight, head.bias, embeddings))
        logits = torch.nn.functional.linear(values, weight, bias)
        probs = objective_of(task).probabilities(logits / temperature)
    return Reference(Outputs(probs.numpy(), logits.numpy(), embeddings, cam=None), head.bias, _COMPUTED_BY)


def torch_outputs(module: DeployModule, images: NDArray[np.uint8]) -> Outputs:
    """Run `module` in eval mode on images (N, h, w, 3) uint8; return its outputs."""
    parts = []
    with evaluating(module), torch.no_grad():
        largest = batch_sizes_for(*images.shape[1:3])[-1]
        for start in range(0, len(images), largest):
            batch = torch.from_numpy(images[start : start + largest]).to(module.temperature.device)
            values = (output.cpu().numpy() for output in module(batch))
            parts.append(Outputs(**{"cam": None, **dict(zip(module.outputs, values, strict=True))}))
    return joined(parts)
