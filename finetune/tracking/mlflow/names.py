"""Names and texts as MLflow takes them."""

from __future__ import annotations

import json
import re

_MAX_VALUE_CHARACTERS = 6000
_MAX_KEY_CHARACTERS = 250


def metric_key(journal_key: str) -> str | None:
    """Return the name of a metric's course: what an epoch was judged by is part of training, and is told apart from the result.

    What is measured of each stage comes last, in sections of its own. None: the metric is no course, and is a param or a cost.
    """
    section, _, name = journal_key.partition("/")
    if section == "head":
        return None
    if "/" in name:
        return key_text(f"weights/{name}")
    return key_text(f"train/{name}" if section == "train" else f"train/{section}_{name}")


def key_text(name: str) -> str:
    """Return a name that MLflow takes: its characters, no empty or dotted path part, no two dots first, at most 250 long."""
    parts = (part for part in re.sub(r"[^\w.\-: /]", "_", name).split("/") if part.strip(". "))
    return re.sub(r"^\.{2,}", "", "/".join(parts))[:_MAX_KEY_CHARACTERS].rstrip("/") or "_"


def value_text(value: object, limit: int = _MAX_VALUE_CHARACTERS) -> str:
    """Return a value as a param holds it; what is too long is cut, the same way each time, and says so."""
    if isinstance(value, float) and not isinstance(value, bool):
        text = f"{value:.6g}"
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) <= limit:
        return text
    note = f"… ({len(text)} characters)"
    return text[: limit - len(note)] + note
