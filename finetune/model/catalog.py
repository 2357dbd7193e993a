"""Which backbones there are: timm's architecture names, near misses, and what timm records about each one's pretrained weights.

Builds nothing and downloads nothing.
"""

from __future__ import annotations

from typing import Any

import timm

import finetune.model.depth  # noqa: F401  # registers our own networks
from finetune.errors import UnknownBackbone, did_you_mean

_SHOWN = 5


def list_backbones(pattern: str = "*") -> tuple[str, ...]:
    """Architecture names that match a shell pattern (``resnet*d``), or contain `pattern` if it has no wildcard.

    Raises:
        UnknownBackbone: nothing matches; the message holds near misses.
    """
    wanted = pattern if any(wildcard in pattern for wildcard in "*?[") else f"*{pattern}*"
    names = tuple(timm.list_models(wanted))
    if not names:
        raise UnknownBackbone(f"no backbone matches {pattern!r}.{_suggest(pattern)} All of them: finetune backbones '*'")
    return names


def all_names() -> tuple[str, ...]:
    """Return every architecture, and every architecture with each tag of its pretrained weights."""
    return (*timm.list_models(), *timm.list_models(pretrained=True, include_tags=True))


def pretrained_cfg(name: str) -> dict[str, Any]:
    """What timm records about the weights of `name` (an architecture, or ``architecture.tag``): preprocessing, licence, address.

    Raises:
        UnknownBackbone: no such architecture, or no such tag of it.
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
    """``resnet50.a1_in1k`` is architecture ``resnet50`` with the weights tagged ``a1_in1k``; the tag may be empty."""
    architecture, _, tag = name.partition(".")
    return architecture, tag


def _tags(architecture: str) -> list[str]:
    return [split_name(name)[1] for name in timm.list_models(architecture, pretrained=True, include_tags=True)]


def _suggest(name: str) -> str:
    """Architectures whose name contains what was given (``mobilenetv3``), else near misses by spelling."""
    names = timm.list_models()
    given = name.lower().replace("-", "_")
    containing = [known for known in names if given and given in known]
    if not containing or given in containing:
        return did_you_mean(given, names)
    more = ", …" if len(containing) > _SHOWN else ""
    return f" Names like it: {', '.join(containing[:_SHOWN])}{more}."
