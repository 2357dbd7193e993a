"""Append-only journals in JSON Lines format, each line written with a single call."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.storage.files import json_text


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line, after ending a line that a killed process left unfinished.

    NaN and infinity, which JSON does not have, are written as null.
    """
    try:
        line = json_text(record) + "\n"
    except ValueError:
        line = json_text(_finite(record)) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, (("\n" if torn else "") + line).encode())
    finally:
        os.close(descriptor)


def _finite(value: Any) -> Any:
    """Return `value` with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of all complete lines of a journal; empty if there is no file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return []
    records = []
    # Not splitlines(): a message may contain other characters that Python treats as line ends, such as U+2028.
    for line in text.split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
