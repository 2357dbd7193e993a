"""Tell from a list of timm's names why a name is none of them, with similar names. Torch-free.

The list is timm's own (`finetune.model.catalog.all_names`); a server, which cannot import timm, gets it from a child process.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune.errors import did_you_mean

_SHOWN = 5


def split_name(name: str) -> tuple[str, str]:
    """Split ``resnet50.a1_in1k`` into the architecture ``resnet50`` and the tag ``a1_in1k`` of its weights (may be empty)."""
    architecture, _, tag = name.partition(".")
    return architecture, tag


def suggestion(architecture: str, known: Sequence[str]) -> str:
    """Return a sentence with the architectures whose name contains the given one (``mobilenetv3``), else with similar ones."""
    given = architecture.lower().replace("-", "_")
    containing = [name for name in known if given and given in name]
    if not containing or given in containing:
        return did_you_mean(given, known)
    more = ", …" if len(containing) > _SHOWN else ""
    return f" Names like it: {', '.join(containing[:_SHOWN])}{more}."


def unknown_architecture(name: str, known: Sequence[str]) -> str:
    """Return the message for a name whose architecture is not among the known ones."""
    return f"timm has no architecture {name[:200]!r}.{suggestion(split_name(name)[0][:200], known)}"


def unknown_tag(architecture: str, tag: str, tags: Sequence[str]) -> str:
    """Return the message for a tag of weights that an architecture does not have."""
    allowed = ", ".join(tags) or "none"
    return f"{architecture} has no weights tagged {tag[:200]!r}; its tags are {allowed}.{did_you_mean(tag[:200], tags)}"


def problem_of_name(name: str, names: Sequence[str]) -> str | None:
    """Return why a backbone is not in timm's list of names, or None if it is.

    Args:
        names: all architectures, and each with each tag of its weights.
    """
    if name in names:
        return None
    architecture, tag = split_name(name)
    architectures = [known for known in names if "." not in known]
    if architecture not in architectures:
        return unknown_architecture(name, architectures)
    return unknown_tag(architecture, tag, [split_name(known)[1] for known in names if known.startswith(f"{architecture}.")])
