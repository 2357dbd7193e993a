"""Cut a classifier at a stage boundary into a prefix, whose output can be cached if it is frozen, and a suffix.

`suffix(prefix(images))` runs the same modules on the same tensors as `classifier(images)`, so in eval mode the results are
bit-equal. Both parts share the classifier's parameters; nothing is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from finetune.model.backbone import Backbone
from finetune.model.classifier import Classifier


@dataclass(frozen=True)
class Cut:
    """A classifier in two parts.

    Args:
        stage: the first stage of the suffix; if it equals the number of stages, the suffix is the head alone.
        prefix: computes the activation at the cut from normalised images (B, 3, h, w); it can be exported to ONNX.
        suffix: computes the logits (B, C) from that activation; it follows the train and eval mode of the classifier.
        activation_shape: of the activation of one image at the cut.
    """

    stage: int
    prefix: nn.Module
    suffix: Callable[[Tensor], Tensor]
    activation_shape: tuple[int, ...]


def cut_at(classifier: Classifier, stage: int) -> Cut:
    """Cut a classifier before `stage`.

    Raises:
        ValueError: there is no cut before `stage`; ask `why_not_cut` first.
    """
    backbone = classifier.backbone
    if reason := why_not_cut(backbone, stage):
        raise ValueError(f"{backbone.name} cannot be cut before stage {stage}: {reason}")
    if stage == len(backbone.stages):
        return Cut(stage, _Embedding(classifier), classifier.head_logits, (classifier.head.in_features,))
    chain = backbone.layout.chain[_chain_position(backbone, stage) :]
    tail = tuple((backbone.module.get_submodule(one.name), dict(one.options)) for one in chain)

    def suffix(activation: Tensor) -> Tensor:
        for module, options in tail:
            activation = module(activation, **{key: _on_device_of(activation, value) for key, value in options.items()})
        return classifier.head_logits(classifier.read(activation))

    prefix = _Prefix(_without(backbone.module, frozenset(one.name for one in chain)))
    return Cut(stage, prefix, suffix, chain[0].input_shape)


def _on_device_of(activation: Tensor, option: Any) -> Any:
    return option.to(activation.device) if isinstance(option, Tensor) else option


def why_not_cut(backbone: Backbone, stage: int) -> str:
    """Return a phrase that says why there can be no cut before `stage`; an empty string if there can be one."""
    if not 0 < stage <= len(backbone.stages):
        return f"a cut is before one of the stages 1 to {len(backbone.stages)}"
    if stage < len(backbone.stages) and _chain_position(backbone, stage) < backbone.layout.replay_from:
        return "from there on its modules exchange more than one activation"
    return ""


def _chain_position(backbone: Backbone, stage: int) -> int:
    return backbone.layout.chain_stages.index(stage)


class _Embedding(nn.Module):
    """The whole backbone with pooling, as a prefix."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.embed(images)


class _Prefix(nn.Module):
    """A backbone whose modules after the cut return their input."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> Tensor:
        activation: Tensor = self.body.forward_features(images)  # type: ignore[operator]
        return activation


class _ReturnInput(nn.Module):
    """A module that takes the place of another and returns its input."""

    def forward(self, activation: Tensor, **_: Any) -> Tensor:
        return activation


def _without(module: nn.Module, skipped: frozenset[str], above: str = "") -> nn.Module:
    """Return a shallow copy in which the modules named in `skipped` return their input; all other modules are shared."""
    twin = copy.copy(module)
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        full = f"{above}.{name}" if above else name
        if full in skipped:
            children[name] = _ReturnInput()
        elif child is not None and any(other.startswith(f"{full}.") for other in skipped):
            children[name] = _without(child, skipped, full)
        else:
            children[name] = child
    twin._modules = children
    return twin
