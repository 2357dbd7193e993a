"""List the available backbones, suggest similar names, and look up timm's record of their pretrained weights.

Nothing is built or downloaded.
"""

from __future__ import annotations

from typing import Any

import timm

import finetune.model.depth  # noqa: F401  # registers our own networks
from finetune.backbone_names import split_name, suggestion, unknown_architecture, unknown_tag
from finetune.errors import UnknownBackbone


def list_backbones(pattern: str = "*") -> tuple[str, ...]:
    """Return the architectures whose name matches a shell pattern (``resnet*d``), or contains `pattern` if it has no wildcard.

    Raises:
        UnknownBackbone: nothing matches; the message suggests similar names.
    """
    wanted = pattern if any(wildcard in pattern for wildcard in "*?[") else f"*{pattern}*"
    names = tuple(timm.list_models(wanted))
    if not names:
        raise UnknownBackbone(
            f"no backbone matches {pattern!r}.{suggestion(pattern, timm.list_models())} All of them: finetune backbones '*'"
        )
    return names


def all_names() -> tuple[str, ...]:
    """Return all architectures, earlier names of them, and each architecture with each tag of its pretrained weights."""
    earlier = (name for name, now in timm.models.get_deprecated_models().items() if now)
    return (*timm.list_models(), *earlier, *timm.list_models(pretrained=True, include_tags=True))


def pretrained_cfg(name: str) -> dict[str, Any]:
    """Return timm's record of the weights of `name` (``architecture`` or ``architecture.tag``): preprocessing, licence, address.

    Raises:
        UnknownBackbone: there is no such architecture, or it has no weights with this tag.
    """
    architecture, tag = split_name(name)
    if not timm.is_model(architecture):
        raise UnknownBackbone(f"model.backbone: {unknown_architecture(name, timm.list_models())}")
    tags = _tags(architecture)
    if name != architecture and tag not in tags:
        raise UnknownBackbone(f"model.backbone: {unknown_tag(architecture, tag, tags)}")
    found = timm.get_pretrained_cfg(name)
    recorded: dict[str, Any] = found.to_dict() if found is not None else {}
    return {**recorded, "architecture": architecture}


def _tags(architecture: str) -> list[str]:
    return [split_name(name)[1] for name in timm.list_models(architecture, pretrained=True, include_tags=True)]
