"""The types for a table in any format: named columns, and rows of cells as the file contains them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune.bundle.image_limits import ImageLimits
from finetune.data.files import LocalFile, SourceFile, StoredFile
from finetune.data.places.remote import RemoteFile
from finetune.data.places.tree import Node
from finetune.data.reading import Reading
from finetune.messages import printable
from finetune.storage.files import write_atomic

WHOLE_FILE = ImageLimits(max_bytes=1 << 40)


class Embedded(Protocol):
    """An image that is embedded in the table."""

    @property
    def file(self) -> SourceFile: ...

    @property
    def name(self) -> str | None:
        """The image's name in the table, or None."""
        ...


Cell = str | Sequence[str] | Embedded | None


@dataclass(frozen=True)
class Row:
    """One row; `place` is its location in messages."""

    place: str
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Table:
    """A table that has been opened.

    Args:
        rows: returns an iterator over all rows.
        class_names: class names by column, for columns of class numbers whose names are in the file.
        remarks: sentences on how the table was interpreted.
    """

    columns: tuple[str, ...]
    rows: Callable[[], Iterator[Row]]
    remarks: tuple[str, ...] = ()


def open_table(node: Node, reading: Reading) -> Table:
    """Open a table in the format of its suffix.

    Raises:
        DataError: it is not in this format.
    """
    from finetune.data.tables import columnar, text

    openers: Mapping[str, Callable[[Node, Reading], Table]] = {
        ".csv": text.open_separated,
        ".tsv": text.open_separated,
        ".jsonl": text.open_json_lines,
        ".ndjson": text.open_json_lines,
        ".parquet": columnar.open_parquet,
    }
    return openers[node.suffix](node, reading)


SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"})


def local_path(node: Node, reading: Reading) -> Path:
    """Return the path of a file with a node's contents, for readers that seek; if the node is no local file, copy it."""
    if isinstance(node.file, LocalFile | StoredFile):
        return node.file.path
    if isinstance(node.file, RemoteFile):
        return node.file.fetch()
    copy = reading.scratch(f"copy {node.file} {node.file.state()}") / f"table{node.suffix}"
    if not copy.exists() or node.file.state() is None:
        data = node.file.read(WHOLE_FILE)
        reading.make_room(len(data), printable(node.path))
        write_atomic(copy, lambda stream: stream.write(data), mode=0o600)
    return copy
