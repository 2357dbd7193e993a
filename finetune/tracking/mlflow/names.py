"""Convert metric names and values to what MLflow accepts."""

from __future__ import annotations

import json
import re

_MAX_VALUE_CHARACTERS = 6000
_MAX_KEY_CHARACTERS = 250


def metric_key(journal_key: str) -> str | None:
    """Return MLflow's key for a metric's history: ``val/loss`` of an epoch becomes ``train/val_loss``, apart from final figures.

    Measurements of stages get separate sections under ``weights/``, which MLflow lists last. None for metrics without a history
    (``head/…``), which are logged as params or costs.
    """
    section, _, name = journal_key.partition("/")
    if section == "head":
        return None
    if "/" in name:
        return key_text(f"weights/{name}")
    return key_text(f"train/{name}" if section == "train" else f"train/{section}_{name}")


def key_text(name: str) -> str:
    """Return a valid MLflow key: allowed characters only, no empty or dotted path parts, at most 250 characters."""
    parts = (part for part in re.sub(r"[^\w.\-: /]", "_", name).split("/") if part.strip(". "))
    return re.sub(r"^\.{2,}", "", "/".join(parts))[:_MAX_KEY_CHARACTERS].rstrip("/") or "_"


def value_text(value: object, limit: int = _MAX_VALUE_CHARACTERS) -> str:
    """Return a value as the text of a param; a longer text is cut deterministically and ends with a note."""
    if isinstance(value, float) and not isinstance(value, bool):
        text = f"{value:.6g}"
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) <= limit:
        return text
    note = f"… ({len(text)} characters)"
    return text[: limit - len(note)] + note
