"""An annotated spec file: all fields of a job spec as YAML, with their defaults, descriptions and allowed values. Torch-free."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from finetune.errors import InvalidInput, did_you_mean
from finetune.spec import METHOD_SECTIONS, JobSpec, Section

COLUMNS = 80
PLACEHOLDER = "photos"  # the value of training_file, which has no default


def annotated_spec(key: str = "") -> str:
    """Return the spec with all defaults as YAML text; it is a valid spec file once ``training_file`` is set.

    Args:
        key: field path of a section or a field, such as ``data`` or ``hyperparameters.l2``; by default the whole spec.

    Raises:
        InvalidInput: there is no such field.
    """
    path = tuple(part for part in key.split(".") if part)
    lines = list(_section(JobSpec, path, 0))
    if path and not lines:
        names = sorted(_paths(JobSpec))
        raise InvalidInput(f"{key}: no such field of the job spec.{did_you_mean(key, names)} finetune spec lists all fields")
    return "\n".join(lines) + "\n"


def _section(section: type[Section], path: tuple[str, ...], depth: int) -> Iterator[str]:
    """Yield the lines of the fields of a section; with a `path`, only of the field that it leads to."""
    schemas = section.model_json_schema()["properties"]
    for name, field in section.model_fields.items():
        if path and path[0] != name:
            continue
        inner = _inner(field)
        if inner is None:
            if len(path) < 2:
                yield from _field(name, field, schemas[name], depth)
            continue
        lines = list(_methods(path[1:], depth + 1) if field.discriminator else _section(inner, path[1:], depth + 1))
        if lines:
            yield from _comment(field.description or "", depth)
            yield f"{'  ' * depth}{name}:"
            yield from lines


def _inner(field: FieldInfo) -> type[Section] | None:
    """Return the class of a field that is a section, None for any other field."""
    if field.discriminator:
        return METHOD_SECTIONS["linear_probe"]
    return field.annotation if isinstance(field.annotation, type) and issubclass(field.annotation, Section) else None


def _methods(path: tuple[str, ...], depth: int) -> Iterator[str]:
    """Yield the lines of ``method``: its type, and as comments the keys that only some of the methods have."""
    if len(path) > 1:
        return
    if not path or path[0] == "type":
        yield from _comment(f"({' | '.join(METHOD_SECTIONS)})", depth)
        yield f"{'  ' * depth}type: linear_probe"
    keys = dict.fromkeys(name for section in METHOD_SECTIONS.values() for name in section.model_fields if name != "type")
    for key in keys:
        if path and path[0] != key:
            continue
        having = [name for name, section in METHOD_SECTIONS.items() if key in section.model_fields]
        section = METHOD_SECTIONS[having[0]]
        *comment, value = _field(key, section.model_fields[key], section.model_json_schema()["properties"][key], depth)
        meaning = " ".join(line.strip().removeprefix("# ") for line in comment)
        yield from _comment(f"For {', '.join(having)}: {meaning}", depth)
        yield f"{'  ' * depth}# {value.strip()}"


def _field(name: str, field: FieldInfo, schema: Mapping[str, Any], depth: int) -> Iterator[str]:
    value = PLACEHOLDER if field.is_required() else field.get_default(call_default_factory=True)
    yield from _comment(f"{field.description or ''} {allowed_values(schema)}".strip(), depth)
    yield f"{'  ' * depth}{name}: {_inline(value)}"


def _comment(text: str, depth: int) -> Iterator[str]:
    start = f"{'  ' * depth}# "
    yield from textwrap.wrap(
        text, COLUMNS, initial_indent=start, subsequent_indent=start, break_long_words=False, break_on_hyphens=False
    )


def _inline(value: Any) -> str:
    """Return a value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def allowed_values(schema: Mapping[str, Any]) -> str:
    """Return the values that a field's JSON schema allows, such as ``(auto | whole number, 32 to 1024)``; empty for any text."""
    words: list[str] = []
    for option in schema.get("anyOf", [schema]):
        if "enum" in option or "const" in option:
            words += [_inline(value) for value in option.get("enum", [option.get("const")])]
        else:
            words.append(_kind(option))
    return "" if words == ["text"] else f"({' | '.join(dict.fromkeys(words))})"


def _kind(option: Mapping[str, Any]) -> str:
    """Return the kind of value that one option of a JSON schema allows, with its range."""
    kind = {
        "integer": "whole number", "number": "number", "string": "text", "boolean": "true | false", "null": "null",
        "array": "list", "object": "mapping",
    }[option["type"]]  # fmt: skip
    low, above = option.get("minimum"), option.get("exclusiveMinimum")
    high, below = option.get("maximum"), option.get("exclusiveMaximum")
    first = f"{low:,.15g}" if low is not None else f"above {above:,.15g}" if above is not None else ""
    last = f" to {high:,.15g}" if high is not None else f" to less than {below:,.15g}" if below is not None else " or more"
    return f"{kind}, {first}{last}" if first else kind


def _paths(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the field paths of all fields and sections."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        inner = _inner(field)
        if field.discriminator:
            yield from {f"{prefix}{name}.{key}" for one in METHOD_SECTIONS.values() for key in one.model_fields}
        elif inner is not None:
            yield from _paths(inner, f"{prefix}{name}.")
