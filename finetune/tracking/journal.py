"""``metrics.jsonl`` as points for MLflow: what is new in it, and what counts as the same point."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.tracking.record import key_text

_JOURNAL_BYTES = 4_000_000  # read at a time

Identity = tuple[str, int, float | None]  # key, step, value


class Journal:
    """Reads the lines that were appended to ``metrics.jsonl`` since they were last accepted."""

    def __init__(self, path: Path) -> None:
        self._path, self._accepted, self._read = path, 0, 0

    def unread(self) -> Iterator[list[dict[str, Any]]]:
        """Batches of whole lines; a line that is being written, or that a kill tore, is left out."""
        if not self._path.exists():
            return
        if self._path.stat().st_size < self._accepted:  # a resume cut it back to its checkpoint
            self._accepted = 0
        self._read = self._accepted
        with open(self._path, "rb") as stream:
            while True:
                stream.seek(self._read)
                chunk = stream.read(_JOURNAL_BYTES)
                whole = chunk[: chunk.rfind(b"\n") + 1]
                if not whole:
                    return
                self._read += len(whole)
                yield [record for line in whole.splitlines() if (record := _parse(line))]

    def accept(self) -> None:
        self._accepted = self._read


def points_of(record: Mapping[str, Any]) -> Iterator[tuple[str, float, int, int]]:
    """(key, value, time in ms, step) of each value of a journal line; the epoch is a metric too, so that charts can use it."""
    at_ms, step = int(record["at"] * 1000), int(record["step"])
    values = dict(record["values"])
    if record.get("epoch") is not None:
        values["epoch"] = record["epoch"]
    for key, value in values.items():
        if value is None or isinstance(value, int | float):  # the journal writes NaN as null
            yield key_text(key), math.nan if value is None else float(value), at_ms, step


def identity(key: str, step: int, value: float) -> Identity:
    """What makes two points the same one.

    A resumed run computes some steps again, at another time of day. A step of training is the same step then, whatever a
    clock-dependent figure such as images per second says; an evaluation is the same only if its value is.
    """
    return (key, step, None if key.startswith(("train/", "stage/")) else value)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
