"""Read and write ``weights.safetensors`` of a bundle. Torch-free; `finetune.bundle.weights` describes its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from finetune.bundle.manifest import WEIGHTS
from finetune.bundle.weights import BACKBONE, HEAD_BIAS, HEAD_WEIGHT, METADATA_KEY, Origin
from finetune.errors import WeightsError

Tensors = Mapping[str, NDArray[np.generic]]


def read_tensors(origin: Origin) -> Tensors:
    """Return all tensors in the weights file of a bundle.

    Raises:
        WeightsError: the checksum of the file differs from that in the manifest.
    """
    data = origin.file.read_bytes()
    if hashlib.sha256(data).hexdigest() != origin.manifest.files[WEIGHTS]:
        raise WeightsError(f"{origin.file}: was changed or cut short since it was exported; copy or export the bundle again")
    return dict(safetensors.numpy.load(data))


def backbone_tensors(tensors: Tensors) -> Tensors:
    """Return the backbone's tensors under timm's names; empty if the file does not contain the backbone."""
    return {name.removeprefix(BACKBONE): tensor for name, tensor in tensors.items() if name.startswith(BACKBONE)}


def serialised_tensors(
    head_weight: NDArray[np.float32], head_bias: NDArray[np.float32], backbone: Tensors, *, pooling: str, seed: int
) -> bytes:
    """Return the content of the weights file; equal values give equal bytes."""
    tensors = {HEAD_WEIGHT: head_weight, HEAD_BIAS: head_bias, **{f"{BACKBONE}{name}": value for name, value in backbone.items()}}
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    data: bytes = safetensors.numpy.save(
        contiguous, {METADATA_KEY: json.dumps({"pooling": pooling, "seed": seed}, sort_keys=True)}
    )
    return data
