"""An auxiliary classifier on an inner stage, for training only (Szegedy et al. 2014, arXiv:1409.4842): dropped at export.

Global average pool and one linear layer on the stage's activation. It gives the stage a gradient of its own, which deep networks
without shortcuts need most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from finetune.errors import InvalidInput, did_you_mean
from finetune.model.backbone import Backbone

# What the auxiliary loss counts beside the main loss: 0.3 in the paper, 0.4 in its authors' Inception v3 training.
AUX_LOSS_WEIGHT = 0.4


class AuxiliaryHead(nn.Module):
    """Stage activation to logits."""

    def __init__(self, backbone: Backbone, stage: int, num_classes: int) -> None:
        super().__init__()
        self.stage = stage
        self._format = backbone.feature_format
        self._last_module = _last_link(backbone, stage)
        shape = backbone.stages[stage].output_shape
        if not shape:
            name = backbone.stages[stage].name
            raise InvalidInput(f"model.head.aux: stage {name!r} of {backbone.name} ends in several maps; leave aux at null")
        self.linear = nn.Linear(shape[-1] if len(shape) == 2 or self._format.channels_last else shape[0], num_classes)

    def forward(self, activation: Tensor) -> Tensor:
        """The stage's activation, in timm's own layout, to logits (B, C)."""
        logits: Tensor = self.linear(self._format.as_map(activation).mean((2, 3)))
        return logits

    @contextlib.contextmanager
    def listening(self, backbone: Backbone) -> Iterator[list[Tensor]]:
        """While open, every forward pass through the stage appends its activation to the list that is yielded."""
        heard: list[Tensor] = []
        module = backbone.module.get_submodule(self._last_module)
        handle = module.register_forward_hook(lambda _, __, activation: heard.append(activation))
        try:
            yield heard
        finally:
            handle.remove()


def auxiliary_stage(backbone: Backbone, aux: bool | str) -> int:
    """The stage that `aux` means: a name, or True for the one before the last, where Inception has its own.

    Raises:
        InvalidInput: no such stage, or the last one, whose activation the head already has.
    """
    names = [stage.name for stage in backbone.stages[:-1]]
    if aux is True:
        return len(names) - 1
    if aux not in names:
        near = did_you_mean(str(aux), names)
        raise InvalidInput(
            f"model.head.aux: {backbone.name} has no inner stage {aux!r}; allowed are true or {', '.join(names)}.{near}"
        )
    return names.index(str(aux))


def _last_link(backbone: Backbone, stage: int) -> str:
    layout = backbone.layout
    return [link.name for link, owner in zip(layout.links, layout.link_stages, strict=True) if owner == stage][-1]
