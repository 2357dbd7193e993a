"""Measure dead channels: the share of a layer's channels whose value is the same for all images and positions.

A channel of a ReLU that is zero everywhere passes no gradient back, so it cannot recover (Lu et al. 2019, arXiv:1903.06733). Only
the outputs of activation functions are measured, because only there does a constant mean that the channel is dead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from finetune.model.classifier import Classifier
from finetune.training.recipe import stage_key

CONSTANT = 1e-6  # relative to the layer's largest absolute value; a channel that varies less is constant
FEWEST_VALUES = 64  # of a channel (images times positions); with fewer, a rarely active channel may look dead
# these classes of torch.nn.modules.activation are not element-wise functions
_NOT_OF_ONE_VALUE = ("Softmax", "MultiheadAttention", "Threshold", "GLU")


@dataclass
class Activity:
    """For each stage, the share of dead channels in the layer that has most of them."""

    dead_fractions: dict[str, float] = field(default_factory=dict)  # stage key -> share

    def update(self, stage: str, output: Tensor, channel_axis: int) -> None:
        """Update the share of `stage` with the output of one of its activation functions."""
        axis = channel_axis % output.ndim
        others = [dim for dim in range(output.ndim) if dim != axis]
        n_values = output.numel() // max(output.shape[axis], 1)
        if not others or n_values < FEWEST_VALUES:
            return
        high, low = output.amax(others), output.amin(others)  # (C,)
        largest = torch.maximum(high.abs().max(), low.abs().max())
        dead = float(((high - low) <= CONSTANT * largest).float().mean())
        self.dead_fractions[stage] = max(self.dead_fractions.get(stage, 0.0), dead)


@contextmanager
def measuring_activity(classifier: Classifier) -> Iterator[Activity]:
    """Measure dead channels in every forward pass through the backbone during the block."""
    activity = Activity()
    handles = [module.register_forward_hook(_hook(activity, stage, axis)) for module, stage, axis in _layers(classifier)]
    try:
        yield activity
    finally:
        for handle in handles:
            handle.remove()


def _hook(activity: Activity, stage: str, axis: int) -> Any:
    def update(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim > 2 and max(output.shape[2:]) > 1:
            activity.update(stage, output, axis)

    return update


def _layers(classifier: Classifier) -> Sequence[tuple[nn.Module, str, int]]:
    """Return the activation modules of the backbone, each with its stage's key and the axis of the channels in its output."""
    backbone, found = classifier.backbone.module, []
    stages_of = classifier.backbone.layout.module_stages
    for name, module in backbone.named_modules():
        if _is_activation(module) and len(stages_of[name]) == 1:
            (stage,) = stages_of[name]
            found.append((module, stage_key(stage), _channel_axis(backbone.get_submodule(name.rpartition(".")[0]))))
    return found


def _is_activation(module: nn.Module) -> bool:
    origin, kind = type(module).__module__, type(module).__name__
    return (origin == "torch.nn.modules.activation" or origin.startswith("timm.layers.activations")) and not any(
        part in kind for part in _NOT_OF_ONE_VALUE
    )


def _channel_axis(parent: nn.Module) -> int:
    """Return -1 for an activation beside linear layers (an MLP), whose channels are last; 1 beside convolutions."""
    return -1 if any(isinstance(child, nn.Linear) for child in parent.children()) else 1
