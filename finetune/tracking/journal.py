"""Read new metric values from ``metrics.jsonl``, even if the file is truncated and rewritten by a resumed run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.tracking.tracker import Point

_READ_BYTES = 4_000_000
_REMEMBERED_BYTES = 64


class Journal:
    """Reads the lines that were appended to a journal since the last call of `accept`.

    A resumed run truncates the journal to the state of its checkpoint. Then the journal is read from the beginning again, and
    `LastPoints` filters the points that have been sent.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._accepted, self._read = 0, 0  # bytes
        self._before = b""  # the last bytes before the accepted position
        self._seen = b""

    def unread(self) -> Iterator[list[dict[str, Any]]]:
        """Yield batches of the records on complete lines that were not accepted yet."""
        if not self._path.exists():
            return
        with open(self._path, "rb") as stream:
            if not self._is_continued(stream):
                self._accepted, self._before = 0, b""
            self._read, self._seen = self._accepted, self._before
            while True:
                stream.seek(self._read)
                chunk = stream.read(_READ_BYTES)
                whole = chunk[: chunk.rfind(b"\n") + 1]
                if not whole:
                    return
                self._read += len(whole)
                self._seen = (self._seen + whole)[-_REMEMBERED_BYTES:]
                yield [record for line in whole.split(b"\n") if (record := _parse(line)) is not None]

    def accept(self) -> None:
        """Mark everything that `unread` has yielded so far as read."""
        self._accepted, self._before = self._read, self._seen

    def _is_continued(self, stream: Any) -> bool:
        """Return whether the bytes before the accepted position are unchanged, that is, the file was not truncated."""
        stream.seek(self._accepted - len(self._before))
        return bool(stream.read(len(self._before)) == self._before)


class LastPoints:
    """The last point of each metric that was sent, so that points that a resumed run repeats are not sent again."""

    def __init__(self, reached: Mapping[str, tuple[int, float | None]]) -> None:
        self._reached = dict(reached)

    def add(self, point: Point) -> bool:
        """Record a point as sent; return whether it is new, that is, of a later step or of the same step with another value.

        Keys under ``train/`` and ``head/`` are compared by step only: values that depend on the clock, such as images per second,
        differ when a resumed run repeats the step.
        """
        step, value = self._reached.get(point.key, (-1, None))
        comparable = None if math.isnan(point.value) else point.value
        again = point.step == step and (comparable == value or point.key.startswith(("train/", "head/")))
        if point.step < step or again:
            return False
        self._reached[point.key] = (point.step, comparable)
        return True

    def to_dict(self) -> dict[str, list[Any]]:
        """Return the marks as JSON values."""
        return {key: list(mark) for key, mark in self._reached.items()}


def points_of(record: Mapping[str, Any]) -> Iterator[Point]:
    """Yield the values of one line as points; none for the final line of a run, whose figures do not belong to a step."""
    values = record["values"]
    if any(key.startswith("cost/") for key in values):
        return
    at, step, epoch = float(record["at"]), int(record["step"]), record.get("epoch")
    for key, value in values.items():
        yield Point(key, math.nan if value is None else float(value), at, step, epoch)  # JSON has no NaN: it is null
    if epoch is not None:
        yield Point("train/epoch", float(epoch), at, step, epoch)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("values"), dict) else None
