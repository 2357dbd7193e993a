"""List the available backbones, suggest similar names, and look up timm's record of their pretrained weights.

Nothing is built or downloaded.
"""

from __future__ import annotations

from typing import Any

import timm

import finetune.model.depth  # noqa: F401  # registers our own networks
from finetune.errors import UnknownBackbone, did_you_mean

_SHOWN = 5


def list_backbones(pattern: str = "*") -> tuple[str, ...]:
    """Return the architectures whose name matches a shell pattern (``resnet*d``), or contains `pattern` if it has no wildcard.

    Raises:
        UnknownBackbone: nothing matches; the message suggests similar names.
    """
    wanted = pattern if any(wildcard in pattern for wildcard in "*?[") else f"*{pattern}*"
    names = tuple(timm.list_models(wanted))
    if not names:
        raise UnknownBackbone(f"no backbone matches {pattern!r}.{_suggest(pattern)} All of them: finetune backbones '*'")
    return names


def all_names() -> tuple[str, ...]:
    """Return all architectures, and each architecture with each tag of its pretrained weights."""
    return (*timm.list_models(), *timm.list_models(pretrained=True, include_tags=True))


def pretrained_cfg(name: str) -> dict[str, Any]:
    """Return timm's record of the weights of `name` (``architecture`` or ``architecture.tag``): preprocessing, licence, address.

    Raises:
        UnknownBackbone: there is no such architecture, or it has no weights with this tag.
    """
    architecture, tag = split_name(name)
    if not timm.is_model(architecture):
        raise UnknownBackbone(f"model.backbone: timm has no architecture {name!r}.{_suggest(architecture)}")
    tags = _tags(architecture)
    if tag and tag not in tags:
        allowed = ", ".join(tags) or "none"
        raise UnknownBackbone(
            f"model.backbone: {architecture} has no weights tagged {tag!r}; its tags are {allowed}.{did_you_mean(tag, tags)}"
        )
    found = timm.get_pretrained_cfg(name)
    recorded: dict[str, Any] = found.to_dict() if found is not None else {}
    return {**recorded, "architecture": architecture}


def split_name(name: str) -> tuple[str, str]:
    """Split ``resnet50.a1_in1k`` into the architecture ``resnet50`` and the tag ``a1_in1k`` of its weights (may be empty)."""
    architecture, _, tag = name.partition(".")
    return architecture, tag


def _tags(architecture: str) -> list[str]:
    return [split_name(name)[1] for name in timm.list_models(architecture, pretrained=True, include_tags=True)]


def _suggest(name: str) -> str:
    """Return a sentence with the architectures whose name contains `name` (``mobilenetv3``), else with similar spellings."""
    names = timm.list_models()
    given = name.lower().replace("-", "_")
    containing = [known for known in names if given and given in known]
    if not containing or given in containing:
        return did_you_mean(given, names)
    more = ", …" if len(containing) > _SHOWN else ""
    return f" Names like it: {', '.join(containing[:_SHOWN])}{more}."
