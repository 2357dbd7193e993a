"""Convert pydantic's validation errors to problems: one plain sentence for each field, with its path. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from finetune.errors import Problem, did_you_mean
from finetune.spec.sections import METHODS, SHORTHAND, SUFFIX_PATTERN, Section


def problems_of(
    error: ValidationError,
    given: Mapping[str, Any],
    root: type[Section],
    sections: Mapping[str, type[Section]],
    elsewhere: Mapping[str, type[Section]] | None = None,
) -> list[Problem]:
    """Convert pydantic's errors to one problem per field; errors of a union's branches are merged.

    Args:
        root: the model that `given` was validated against.
        sections: the classes of the sections in `root`, by their key or, in a union, by their type.
        elsewhere: the sections, by their key, that an unknown key may belong to instead.
    """
    requirements: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    sentences: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        where = _field_path(detail, given)
        if sentence := _plain_sentence(detail, root, sections, elsewhere or {}):
            sentences[where] = sentence
        else:
            requirements.setdefault(where, []).append(_requirement(detail))
            values[where] = detail["input"]
    for where, allowed in requirements.items():
        allowed.sort(key="'auto'".__eq__)  # 'auto', which many fields allow, comes last
        sentences.setdefault(where, f"must be {' or '.join(dict.fromkeys(allowed))}, given {values[where]!r}")
    return [Problem(where, sentence) for where, sentence in sentences.items()]


def _field_path(detail: Any, given: Any) -> str:
    """Return the field path of an error, without the names that pydantic adds for branches of unions."""
    location = detail["loc"]
    path = ""
    value: Any = given
    for position, part in enumerate(location):
        names_absent_key = detail["type"] == "missing" and position == len(location) - 1
        if isinstance(part, int):
            path += f"[{part}]"
            value = value[part] if isinstance(value, Sequence) and part < len(value) else None
        elif isinstance(value, Mapping) and (part in value or names_absent_key):
            path += f".{part}" if path else part
            value = value.get(part)
    return path


def _plain_sentence(
    detail: Any, root: type[Section], sections: Mapping[str, type[Section]], elsewhere: Mapping[str, type[Section]]
) -> str | None:
    """Return the message of an error that is not of the form "must be …", else None."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{_meant_instead(detail['loc'], root, sections, elsewhere)}"
    if kind == "missing":
        return "required, and not given"
    if kind == "union_tag_invalid":
        tag = str(context["tag"])
        return f"unknown type {tag!r}; allowed are {', '.join(METHODS)}.{did_you_mean(tag, METHODS)}"
    if kind == "union_tag_not_found":
        return f"needs a type as well, such as --method partial; allowed are {', '.join(METHODS)}"
    if kind == "value_error":
        return str(detail["msg"]).removeprefix("Value error, ")
    return None


_REQUIREMENTS = {
    "model_type": "a section (a mapping of keys)", "model_attributes_type": "a section (a mapping of keys)",
    "dict_type": "a mapping",
    "tuple_type": "a list", "string_type": "a text", "int_type": "a whole number", "int_parsing": "a whole number",
    "int_from_float": "a whole number", "float_type": "a number", "float_parsing": "a number", "bool_type": "true or false",
    "bool_parsing": "true or false", "finite_number": "a finite number",
}  # fmt: skip


def _requirement(detail: Any) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "string_pattern_mismatch" and context["pattern"] == SUFFIX_PATTERN:
        return "at most 63 lower-case letters, digits, '.', '_' and '-', beginning with a letter or a digit, such as my-flowers"
    if kind == "string_pattern_mismatch":
        return f"a text that matches {context['pattern']}"
    if kind in ("string_too_short", "string_too_long"):
        bound, number = ("least", context["min_length"]) if kind == "string_too_short" else ("most", context["max_length"])
        return f"a text of at {bound} {number} character{'' if number == 1 else 's'}"
    if kind in ("model_type", "model_attributes_type") and detail["loc"] and detail["loc"][-1] in SHORTHAND:
        return "a name or a section (a mapping of keys)"
    if kind in ("too_short", "too_long"):
        bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return f"{'a mapping' if context['field_type'] == 'Dictionary' else 'a list'} of {bound}"
    return _REQUIREMENTS.get(kind) or str(detail["msg"]).removeprefix("Input should be ").removeprefix("Value should be ")


_NAMES_OF_OTHER_TOOLS = {
    "img_size": "input_size_px", "image_size": "input_size_px", "imgsz": "input_size_px", "size": "input_size_px",
    "patience": "early_stopping_epochs", "architecture": "backbone", "arch": "backbone",
}  # fmt: skip


def _keys_called(given: str, allowed: Sequence[str]) -> list[str]:
    """Return the keys that an abbreviation (``lr``, ``test``) or the name in another tool refers to."""
    if len(given) < 2:
        return []
    short = [
        key
        for key in allowed
        if "".join(word[0] for word in key.split("_")) == given or key.startswith(f"{given}_") or key.endswith(f"_{given}")
    ]
    return short or [key for key in allowed if key == _NAMES_OF_OTHER_TOOLS.get(given)]


def keys_called_in(sections: Mapping[str, Sequence[str]], given: str) -> list[tuple[str, str]]:
    """Return sections with keys that an abbreviation or the name in another tool refers to, in the order of the sections."""
    return [(section, key) for section, keys in sections.items() for key in _keys_called(given, keys)]


def _meant_instead(
    location: Sequence[str | int],
    root: type[Section],
    sections: Mapping[str, type[Section]],
    elsewhere: Mapping[str, type[Section]],
) -> str:
    """Return a hint for an unknown key: a similar key of the same or another section, or the list of allowed keys."""
    section = root
    for part in location[:-1]:
        section = sections.get(str(part), section)
    given, allowed = str(location[-1]), list(section.model_fields)
    if near := _keys_called(given, allowed):
        return f". Did you mean {' or '.join(map(repr, near))}?"
    others = {name: list(other.model_fields) for name, other in elsewhere.items()}
    if exact := [f"{name}.{given}" for name, fields in others.items() if given in fields]:
        return f". Did you mean {exact[0]!r}?"
    if spelled := did_you_mean(given, allowed):
        return f".{spelled}"
    if meant := keys_called_in(others, given):
        return f". Did you mean {'.'.join(meant[0])!r}?"
    return f"; allowed {'are' if len(allowed) > 1 else 'is'} {', '.join(allowed)}{section.HINT}"
