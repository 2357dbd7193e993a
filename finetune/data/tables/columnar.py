"""Read Parquet and Arrow files: typed columns, often with embedded images. Needs pyarrow, which an extra installs."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.bundle.image import read_bytes
from finetune.bundle.image_formats import HEAD_BYTES, looks_like_image
from finetune.bundle.image_limits import DEFAULT_LIMITS, ImageLimits
from finetune.data.files import SourceFile, state_of
from finetune.data.places.tree import Node
from finetune.data.reading import Reading
from finetune.data.tables.rows import Cell, Row, Table, local_path
from finetune.distribution import install_command
from finetune.errors import DataError, ImageError, MissingExtra
from finetune.messages import printable
from finetune.storage.files import private_file, read_json, write_json
from finetune.storage.store import mark_used

_BATCH_ROWS = 1024
_IMAGE_BATCH_ROWS = 32


def require_pyarrow() -> Any:
    """Return pyarrow.

    Raises:
        MissingExtra: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise MissingExtra(f"Parquet and Arrow tables need pyarrow: {install_command('tables')}") from None
    return pyarrow


def open_parquet(node: Node, reading: Reading) -> Table:
    """Open a Parquet file."""
    pyarrow = require_pyarrow()
    path = local_path(node, reading)
    shown = printable(node.path)
    with parquet_errors_named(shown):
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
        n_rows = file.metadata.num_rows
        file.close()
    features = features_of(schema)
    images = [name for name in schema.names if _is_image_column(path, schema.field(name), shown, n_rows)]
    nested = {name: "path" for name in images if is_image_struct(schema.field(name).type)}
    references = [name for name in nested if n_rows and _holds_no_bytes(path, name, shown)]

    def rows() -> Iterator[Row]:
        with parquet_errors_named(shown):
            plain = [name for name in schema.names if name not in images]
            wanted = [*plain, *(f"{name}.{inner}" for name, inner in nested.items())]
            with pyarrow.parquet.ParquetFile(path) as opened:
                number = 0
                for batch in opened.iter_batches(_BATCH_ROWS, columns=wanted) if wanted else _empty_batches(n_rows):
                    for given in batch if isinstance(batch, list) else batch.to_pylist():
                        cells = {name: as_cell(given[name], features.get(name)) for name in plain}
                        for name in images:
                            called = (given.get(name) or {}).get("path") if name in nested else None
                            if name in references:
                                cells[name] = called
                                continue
                            cells[name] = EmbeddedCell(InParquet(path, shown, name, number, reading), called)
                        yield Row(f"{shown}, row {number + 1}", cells)
                        number += 1

    return Table(tuple(schema.names), rows)


def _is_image_column(path: Path, field: Any, shown: str, n_rows: int) -> bool:
    """Return whether a column contains images, by its type or, for a column of bytes, by its first cells."""
    if is_image_struct(field.type) or not holds_images(field.type):
        return is_image_struct(field.type)
    with parquet_errors_named(shown), require_pyarrow().parquet.ParquetFile(path) as opened:
        first = next(opened.iter_batches(_IMAGE_BATCH_ROWS, columns=[field.name])) if n_rows else None
        values = [] if first is None else [value.as_py() for value in first.column(0)]
        return any(looks_like_image(value[:HEAD_BYTES]) for value in values if value)


def _holds_no_bytes(path: Path, column: str, shown: str) -> bool:
    """Return whether a column of images contains only file names, by its first rows."""
    with parquet_errors_named(shown), require_pyarrow().parquet.ParquetFile(path) as opened:
        first = next(opened.iter_batches(_IMAGE_BATCH_ROWS, columns=[column]))
        return all(image_bytes(value.as_py()) is None for value in first.column(0))


def _empty_batches(n_rows: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, n_rows, _BATCH_ROWS):
        yield [{}] * min(_BATCH_ROWS, n_rows - start)


class parquet_errors_named:
    """Raise `DataError` with one sentence about the table for errors of pyarrow in the block."""

    def __init__(self, shown: str) -> None:
        self.shown = shown

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, DataError | GeneratorExit | KeyboardInterrupt):
            return
        import pyarrow

        if isinstance(error, pyarrow.ArrowException | OSError | ValueError | TypeError | KeyError | UnicodeError | OverflowError):
            reason = str(error).partition("\n")[0][:200]
            raise DataError(f"{self.shown}: the table is damaged or not what its ending says: {reason}") from None


def holds_images(kind: Any) -> bool:
    """Return whether a column's type is that of embedded images: binary, or a struct of bytes and path."""
    import pyarrow.types as types

    return bool(types.is_binary(kind) or types.is_large_binary(kind)) or is_image_struct(kind)


def is_image_struct(kind: Any) -> bool:
    """Return whether a type is the struct that the datasets library keeps an image in."""
    import pyarrow.types as types

    return bool(types.is_struct(kind)) and {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}


def features_of(schema: Any) -> Mapping[str, Sequence[str]]:
    """Return the class names of the columns of class numbers, if the file's metadata contains them."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return {}
    try:
        return class_names(json.loads(metadata)["info"]["features"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def class_names(features: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Return the class names of each class label in the description of features that the datasets library writes."""
    found: dict[str, Sequence[str]] = {}
    for name, feature in features.items():
        inner = feature
        while isinstance(inner, Mapping) and inner.get("_type") in ("Sequence", "List", "LargeList"):
            inner = inner.get("feature", {})
        if isinstance(inner, list) and inner:
            inner = inner[0]
        if isinstance(inner, Mapping) and inner.get("_type") == "ClassLabel" and isinstance(inner.get("names"), list):
            found[name] = [str(one) for one in inner["names"]]
    return found


def as_cell(value: Any, names: Sequence[str] | None) -> Cell:
    """Return a typed value as text."""
    if value is None:
        return None
    if isinstance(value, list):
        texts = [as_cell(one, names) for one in value]
        return [text for text in texts if isinstance(text, str)]
    if isinstance(value, bool):
        return "true" if value else "false"
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None  # -1 is that library's value for no class
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


@dataclass(frozen=True)
class EmbeddedCell:
    """An image in a cell of a column."""

    file: SourceFile
    name: str | None


@dataclass(frozen=True, slots=True)
class ImageCell(ABC):
    """The bytes of an image in a cell of a table file.

    Args:
        shown: the table's name in messages.
        row: counted from 0.
    """

    table: Path
    shown: str
    column: str
    row: int

    @abstractmethod
    def read(self, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
        """Return the bytes.

        Raises:
            ImageError: the cell is empty, damaged or larger than the limits.
        """

    def head(self) -> bytes:
        try:
            return self.read()[:HEAD_BYTES]
        except ImageError:
            return b""

    def state(self) -> str | None:
        state = state_of(self.table)
        return None if state is None else f"{state} {self.column} {self.row}"

    def __str__(self) -> str:
        return f"{self.shown}, row {self.row + 1}"


@dataclass(frozen=True, slots=True)
class InParquet(ImageCell):
    """The bytes of an image in a Parquet file.

    Pages of Parquet are compressed as a whole, so a single image cannot be read efficiently. When the first image is read, all
    images of its column are written into the store, each under the sha256 of its bytes.
    """

    reading: Reading

    def read(self, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
        data = _COLUMNS.read(self, limits)
        if data is None:
            raise ImageError("the cell is empty: the table holds no bytes for this image, and no file of its name is there")
        return data


class _Columns:
    """The columns of images that were written into the store, by table."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._digests: dict[Path, list[str | None]] = {}

    def read(self, cell: InParquet, limits: ImageLimits) -> bytes | None:
        folder = cell.reading.scratch(f"column {cell.table} {state_of(cell.table)} {cell.column}")
        with self._lock:
            if folder not in self._digests:
                self._digests[folder] = _written(cell, folder)
        digest = self._digests[folder][cell.row]
        return None if digest is None else read_bytes(folder / digest[:2] / digest, limits)


_COLUMNS = _Columns()


def _written(cell: InParquet, folder: Path) -> list[str | None]:
    """Return the digests of a column's images, in the order of rows; write the images into `folder` if they are missing."""
    listed = folder / "rows.json"
    if listed.exists():
        digests: list[str | None] = read_json(listed)
        try:
            for digest in filter(None, digests):
                mark_used(folder / digest[:2] / digest)
            return digests
        except OSError:  # some files were deleted to make room in the store
            shutil.rmtree(folder)
    pyarrow = require_pyarrow()
    cell.reading.make_room(cell.table.stat().st_size, cell.shown)
    digests = []
    with parquet_errors_named(cell.shown), pyarrow.parquet.ParquetFile(cell.table) as opened:
        for batch in opened.iter_batches(_IMAGE_BATCH_ROWS, columns=[cell.column]):
            for value in batch.column(0):
                digests.append(_write_one(image_bytes(value.as_py()), folder))
    write_json(listed, digests)
    return digests


def _write_one(data: bytes | None, folder: Path) -> str | None:
    if data is None:
        return None
    digest = hashlib.sha256(data).hexdigest()
    place = folder / digest[:2] / digest
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary := folder / ".arriving", "wb", opener=private_file) as stream:
            stream.write(data)
        os.replace(temporary, place)  # a file that exists is complete
    return digest


def image_bytes(value: Any) -> bytes | None:
    """Return the bytes in a cell of an image column; None if it only names a file."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, str):
        value = base64.b64decode(value)
    return bytes(value) if value is not None else None
