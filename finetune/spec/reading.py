"""Read a job spec from a YAML file, overrides and ``--set key.path=value``, and change fields of one. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import NotFound, SpecError
from finetune.spec.job import JobSpec, parse_spec
from finetune.spec.sections import SHORTHAND


def load_spec(path: Path | None = None, overrides: Mapping[str, Any] | None = None, settings: Iterable[str] = ()) -> JobSpec:
    """Read a YAML spec file, apply `overrides` (nested mapping), then `settings` (``key.path=value`` with YAML values).

    Raises:
        NotFound: the file does not exist.
        SpecError: the file is not YAML, a setting is not ``key=value``, or the result is not a valid spec.
    """
    return parse_spec(merged_mapping(path, overrides, settings))


def merged_mapping(
    path: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    settings: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the mapping that `load_spec` validates: the file with `overrides` and then `settings` applied.

    Args:
        settings: ``key.path=value`` strings with YAML values.
        values: ``key.path`` -> value, applied last.
    """
    merged: dict[str, Any] = _read_yaml(path) if path else {}
    for key_path, value in [*_flatten(overrides or {}), *(_parse_setting(setting) for setting in settings)]:
        _assign(merged, key_path, value)
    for key, value in (values or {}).items():
        _assign(merged, tuple(key.split(".")), value)
    return merged


def with_settings(spec: JobSpec, settings: Mapping[str, Any]) -> JobSpec:
    """Return the spec with some fields changed (``key.path`` -> value).

    Raises:
        SpecError: the result is not a valid spec.
    """
    changed = spec.model_dump(mode="json")
    for key, value in settings.items():
        _assign(changed, tuple(key.split(".")), value)
    return parse_spec(changed)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise NotFound(f"{path}: no such spec file. Give the path of a YAML file, or only flags: finetune train --data FOLDER")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(loaded, dict):
        raise SpecError(f"{path}: a spec is a mapping with at least training_file, found {type(loaded).__name__}")
    return loaded


def _flatten(nested: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    pairs: list[tuple[tuple[str, ...], Any]] = []
    for key, value in nested.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, (*prefix, key))
        else:
            pairs.append(((*prefix, key), value))
    return pairs


_PUNCTUATION = re.compile(r"\s*[^\w\s\[\]{}'\"~]+\s*")  # such as | ; and , which YAML takes for syntax and which are separators


def setting_value(text: str) -> Any:
    """Return the value that ``--set key=text`` means.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return text.strip() if _PUNCTUATION.fullmatch(text) else yaml.safe_load(text)


def _parse_setting(setting: str) -> tuple[tuple[str, ...], Any]:
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise SpecError(f"--set {setting!r}: expected key.path=value, for example hyperparameters.n_epochs=5")
    path = tuple(key.strip().split("."))
    try:
        return path, setting_value(text)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {setting!r}: the value is not YAML: {error}") from None


def _assign(target: dict[str, Any], key_path: Sequence[str], value: Any) -> None:
    for depth, key in enumerate(key_path[:-1]):
        inner = target.get(key)
        if isinstance(inner, str) and depth == 0 and key in SHORTHAND:
            inner = {SHORTHAND[key]: inner}
        target[key] = target = dict(inner) if isinstance(inner, Mapping) else {}
    target[key_path[-1]] = value
