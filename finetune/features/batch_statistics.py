"""Compare the statistics of activations with the running statistics in the batch normalisation of pretrained weights.

The running mean and variance of a batch normalisation are those of its input during pretraining (Ioffe & Szegedy 2015,
arXiv:1502.03167). For photographs with the expected pixel normalisation, the statistics of the lower layers are close to these;
with another scale, or with red and blue exchanged, they are not. No labels are needed, and a hundred images suffice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finetune.model.classifier import Classifier

LAYERS = 12  # the lowest ones; higher layers depend on the objects in the images, which differ from those of pretraining
GROUP_SIZE = 16  # images
_SMALLEST_VARIANCE = 1e-5


class _LastLayerReached(Exception):
    """Ends a forward pass after the last layer that is measured."""


def divergences(classifier: Classifier, pixels: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    """Return the divergences (groups of images, layers) of activation statistics from the running statistics in the weights.

    A divergence is the Kullback-Leibler divergence between normal distributions, averaged over channels; 0 if they are equal.

    Args:
        pixels: (N, h, w, 3), not normalised; the classifier normalises them.

    Returns:
        None if the backbone has no batch normalisation.
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
    """Return the divergence of each layer for one group of images; 0 for a layer that is not reached."""
    found: dict[int, float] = {}

    def measure(layer: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        found[id(layer)] = _divergence(layer, given[0])
        if len(found) == len(layers):
            raise _LastLayerReached

    handles = [layer.register_forward_pre_hook(measure) for layer in layers]
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
