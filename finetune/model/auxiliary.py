"""An auxiliary classifier on an inner stage, for training only (Szegedy et al. 2014, arXiv:1409.4842). It is not exported.

It consists of global average pooling and one linear layer on the stage's activation. Its loss gives the lower stages an
additional gradient, which is most useful in deep networks without shortcuts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from finetune.errors import InvalidInput, did_you_mean
from finetune.model.backbone import Backbone

# The weight of the auxiliary loss: 0.3 in the paper, 0.4 in its authors' training of Inception v3.
AUX_LOSS_WEIGHT = 0.4


class AuxiliaryHead(nn.Module):
    """Global average pooling and a linear layer on the activation of one stage."""

    def __init__(self, backbone: Backbone, stage: int, num_classes: int) -> None:
        super().__init__()
        self.stage = stage
        self._format = backbone.feature_format
        self._last_module = _last_chain_module(backbone, stage)
        shape = backbone.stages[stage].output_shape
        if not shape:
            name = backbone.stages[stage].name
            raise InvalidInput(f"model.head.aux: stage {name!r} of {backbone.name} ends in several maps; leave aux at null")
        self.linear = nn.Linear(shape[-1] if len(shape) == 2 or self._format.channels_last else shape[0], num_classes)

    def forward(self, activation: Tensor) -> Tensor:
        """Return the logits (B, C) of the stage's activation, which has timm's layout."""
        logits: Tensor = self.linear(self._format.as_map(activation).mean((2, 3)))
        return logits

    @contextlib.contextmanager
    def recording(self, backbone: Backbone) -> Iterator[list[Tensor]]:
        """Yield a list to which every forward pass through the stage appends the activation, during the block."""
        activations: list[Tensor] = []
        module = backbone.module.get_submodule(self._last_module)
        handle = module.register_forward_hook(lambda _, __, activation: activations.append(activation))
        try:
            yield activations
        finally:
            handle.remove()


def auxiliary_stage(backbone: Backbone, aux: bool | str) -> int:
    """Return the index of the stage that `aux` names; True means the last but one, as in Inception.

    Raises:
        InvalidInput: there is no such stage, or it is the last one, whose activation the head uses already.
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


def _last_chain_module(backbone: Backbone, stage: int) -> str:
    layout = backbone.layout
    return [one.name for one, own_stage in zip(layout.chain, layout.chain_stages, strict=True) if own_stage == stage][-1]
