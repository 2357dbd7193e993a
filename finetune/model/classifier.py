"""The network that is trained and exported: backbone, pooling over positions, dropout and one linear layer.

With average pooling, applying the linear layer at every position gives the class activation map (Zhou et al. 2016,
arXiv:1512.04150): its mean plus the bias is the logit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.errors import InvalidInput, did_you_mean
from finetune.model.auxiliary import AuxiliaryHead, auxiliary_stage
from finetune.model.backbone import Backbone
from finetune.model.freeze import set_frozen_to_eval
from finetune.model.selection import FreezePlan

Pooling = Literal["avg", "max", "avgmax", "gem"]
CamKind = Literal["linear", "layernorm"]

# The exponent of Radenović et al. 2018 (arXiv:1711.02512). It is not trained, so that pooled features can be cached.
_GEM_POWER = 3.0
_GEM_FLOOR = 1e-6
_HEAD_STD = 0.01


class Classifier(nn.Module):
    """A backbone, pooling, and a linear head.

    ``cam_kind`` is the way in which the class activation map is exact (None: there is no exact map), ``cam_reason`` an
    explanation for the user.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        pooling: Pooling = "avg",
        dropout: float = 0.0,
        aux: bool | str | None = None,
    ) -> None:
        super().__init__()
        if pooling not in _POOLS:
            near = did_you_mean(pooling, list(_POOLS))
            raise InvalidInput(f"model.head.pooling: {pooling!r} is not one of {', '.join(_POOLS)}.{near}")
        if pooling != "avg" and backbone.readout.kind == "own":
            raise InvalidInput(f"model.head.pooling: only avg fits {backbone.name}, given {pooling!r}: {backbone.readout.note}.")
        self.backbone = backbone
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.head = _linear(backbone.num_features, num_classes)
        self.aux = AuxiliaryHead(backbone, auxiliary_stage(backbone, aux), num_classes) if aux else None
        self.plan = FreezePlan(frozenset(stage.index for stage in backbone.stages), bn="train")
        self.cam_kind, self.cam_reason = _cam(backbone, pooling)
        mean, std = torch.tensor(backbone.preprocess.mean), torch.tensor(backbone.preprocess.std)
        # pixel * scale + shift == (pixel / 255 - mean) / std, for pixels in 0..255
        self.register_buffer("_scale", (1 / (255 * std)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_shift", (-mean / std).view(1, 3, 1, 1), persistent=False)
        self._scale: Tensor
        self._shift: Tensor

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    def train(self, mode: bool = True) -> Classifier:
        """Set train or eval mode; frozen modules always stay in eval mode."""
        super().train(mode)
        set_frozen_to_eval(self)
        return self

    def with_head(self, weight: Tensor, bias: Tensor) -> Classifier:
        """Return a classifier with the head `weight` (C, D) and `bias` (C,), which shares all other modules with this one."""
        twin = copy.copy(self)
        head = nn.Linear(self.head.in_features, self.head.out_features)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        twin._modules = {**self._modules, "head": head.to(self.head.weight.device)}
        return twin

    def normalise(self, images_u8: Tensor) -> Tensor:
        """Return images (B, h, w, 3) uint8 as (B, 3, h, w) float32, normalised as the weights expect."""
        return images_u8.permute(0, 3, 1, 2).float() * self._scale + self._shift

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, C) of normalised images (B, 3, h, w) float32."""
        return self.head_logits(self.embed(images))

    def embed(self, images: Tensor) -> Tensor:
        """Return the embedding (B, D), which is the input of the head, of normalised images (B, 3, h, w) float32."""
        return self.read(self.backbone(images))

    def read(self, features: Tensor) -> Tensor:
        """Return the embedding (B, D) of the backbone's features, which have timm's layout."""
        if self.backbone.readout.kind == "own":
            return self.backbone.own_embedding(features)
        pooled = pool(self.backbone.as_map(features), self.pooling)
        if self.backbone.readout.kind == "layernorm":
            norm = self.backbone.layernorm()
            return functional.layer_norm(pooled, pooled.shape[1:], norm.weight, norm.bias, norm.eps)
        return pooled

    def head_logits(self, embedding: Tensor) -> Tensor:
        """Return the logits (B, C) of an embedding (B, D), with dropout in train mode."""
        logits: Tensor = self.head(self.dropout(embedding))
        return logits

    def explain(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return logits (B, C), embedding (B, D) and the activation map (B, h', w') of the top class; None if it is not exact."""
        features = self.backbone(images)
        embedding = self.read(features)
        logits = self.head_logits(embedding)
        if self.cam_kind is None:
            return logits, embedding, None
        return logits, embedding, self._cam(self.backbone.as_map(features), logits.argmax(1))

    def forward_with_aux(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the head and of the auxiliary head, each (B, C), in one forward pass; for training only.

        Raises:
            ValueError: the classifier has no auxiliary head.
        """
        if self.aux is None:
            raise ValueError("this classifier was built without an auxiliary head")
        with self.aux.recording(self.backbone) as activations:
            logits = self(images)
        return logits, self.aux(activations[-1])

    def _cam(self, maps: Tensor, labels: Tensor) -> Tensor:
        """Return the activation map (B, h', w') of one label (B,) per image, from feature maps (B, D, h', w')."""
        weights = self.head.weight[labels]  # (B, D)
        if self.cam_kind == "layernorm":
            norm = self.backbone.layernorm()
            pooled = maps.mean((2, 3), keepdim=True)  # (B, D, 1, 1)
            centre = pooled.mean(1, keepdim=True)
            spread = ((pooled - centre).square().mean(1, keepdim=True) + norm.eps).sqrt()
            maps = (maps - centre) / spread
            maps = maps if norm.weight is None else maps * norm.weight[:, None, None]
            maps = maps if norm.bias is None else maps + norm.bias[:, None, None]
        return (weights[:, :, None, None] * maps).sum(1)


def _linear(num_features: int, num_classes: int) -> nn.Linear:
    """Return a linear layer with weights near zero, so that the first steps fit the head and hardly change the backbone."""
    linear = nn.Linear(num_features, num_classes)
    nn.init.normal_(linear.weight, std=_HEAD_STD)
    nn.init.zeros_(linear.bias)
    return linear


def _avg(maps: Tensor) -> Tensor:
    return maps.mean((2, 3))


def _max(maps: Tensor) -> Tensor:
    return maps.amax((2, 3))


def _avgmax(maps: Tensor) -> Tensor:
    """Return the mean of average and max pooling, as timm's avgmax does."""
    return 0.5 * (_avg(maps) + _max(maps))


def _gem(maps: Tensor) -> Tensor:
    return _avg(maps.clamp(min=_GEM_FLOOR).pow(_GEM_POWER)).pow(1 / _GEM_POWER)


_POOLS: dict[str, Callable[[Tensor], Tensor]] = {"avg": _avg, "max": _max, "avgmax": _avgmax, "gem": _gem}


def pool(maps: Tensor, pooling: Pooling) -> Tensor:
    """Pool maps (B, D, h, w) over positions to (B, D)."""
    return _POOLS[pooling](maps)


def _cam(backbone: Backbone, pooling: Pooling) -> tuple[CamKind | None, str]:
    """Return how the class activation map is exact (None: not at all), and an explanation for the user."""
    note = backbone.readout.note
    if backbone.readout.kind == "own":
        return None, note
    if pooling != "avg":
        return None, f"with {pooling} pooling a logit is not a mean over positions"
    return backbone.readout.kind, note
