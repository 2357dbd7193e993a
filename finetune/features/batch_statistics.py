"""How far activations are from what the batch normalisation of pretrained weights remembers of its training images.

Every batch normalisation keeps the mean and the variance that its input had in training (Ioffe & Szegedy 2015, arXiv:1502.03167).
Photographs that are given to the weights as they expect them come near to these; pixels on another scale, or with red and blue
exchanged, do not, in every layer of the lower network. No labels are needed, and a hundred images suffice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finetune.model.classifier import Classifier

LAYERS = 12  # the lowest: higher ones see objects, and the user's are not those that the weights were trained on
GROUP_SIZE = 16  # images
_SMALLEST_VARIANCE = 1e-5


class _LastLayerReached(Exception):
    """Ends a forward pass where nothing above is of interest."""


def divergences(classifier: Classifier, pixels: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    """Return the divergence (groups of images, layers) between the statistics of activations and those that the weights remember.

    It is the Kullback-Leibler divergence between normal distributions, averaged over channels; 0 where they agree.

    Args:
        pixels: (N, h, w, 3), normalised by the classifier.

    Returns:
        None where the backbone has no batch normalisation.
    """
    layers = [
        module
        for module in classifier.backbone.module.modules()
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
    ][:LAYERS]
    if not layers:
        return None
    groups = [pixels[start : start + GROUP_SIZE] for start in range(0, len(pixels) - GROUP_SIZE + 1, GROUP_SIZE)]
    classifier.eval()
    return np.array([_of_group(classifier, layers, group) for group in groups or [pixels]])


@torch.no_grad()
def _of_group(classifier: Classifier, layers: list[nn.BatchNorm2d], pixels: NDArray[np.uint8]) -> list[float]:
    found: dict[int, float] = {}

    def hear(layer: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        found[id(layer)] = _divergence(layer, given[0])
        if len(found) == len(layers):
            raise _LastLayerReached

    handles = [layer.register_forward_pre_hook(hear) for layer in layers]
    try:
        classifier.backbone(classifier.normalise(torch.from_numpy(pixels)))
    except _LastLayerReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [found.get(id(layer), 0.0) for layer in layers]


def _divergence(layer: nn.BatchNorm2d, activation: Tensor) -> float:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, variance = activation.mean((0, 2, 3)), activation.var((0, 2, 3)) + _SMALLEST_VARIANCE  # (C,)
    expected = layer.running_var + _SMALLEST_VARIANCE
    ratio = variance / expected
    return float((0.5 * (ratio - 1 - ratio.log() + (mean - layer.running_mean) ** 2 / expected)).mean())
