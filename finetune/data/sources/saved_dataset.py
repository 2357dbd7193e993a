"""Read a directory that the datasets library saved to disk: Arrow files with embedded images, one folder for each split."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from finetune.bundle.image_formats import HEAD_BYTES, looks_like_image
from finetune.bundle.image_limits import DEFAULT_LIMITS, ImageLimits, check_bytes
from finetune.data.dataset import Split
from finetune.data.files import state_of
from finetune.data.layout import without_wrapping
from finetune.data.notes import Notes
from finetune.data.places.tree import Folder, Node, Place, shown_path
from finetune.data.reading import Reading
from finetune.data.sources.documents import read_document
from finetune.data.sources.rows import list_table
from finetune.data.sources.source import Listing, Record
from finetune.data.splits_by_name import split_meaning
from finetune.data.tables import Row, Table
from finetune.data.tables.columnar import (
    EmbeddedCell,
    ImageCell,
    as_cell,
    class_names,
    holds_images,
    image_bytes,
    is_image_struct,
    parquet_errors_named,
    require_pyarrow,
)
from finetune.data.tables.rows import local_path
from finetune.errors import DataError, ImageError
from finetune.messages import printable

_INFO, _STATE, _SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"


class SavedDatasetSource:
    """The source for directories that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` writes."""

    name: ClassVar[str] = "a saved dataset"

    def expected(self, shown: str) -> str:
        return f"a directory that the datasets library saved: {shown}/{_STATE} and Arrow files, or {shown}/{_SPLITS} and splits"

    def recognises(self, place: Place) -> bool:
        return place.focus is None and bool(_parts(_root(place)))

    def read(self, place: Place, reading: Reading, notes: Notes) -> Listing:
        records: list[Record] = []
        places: dict[Split | None, str] = {}
        several = False
        for name, folder in _parts(_root(place)):
            split = _split_of(name, folder, place, reading, notes)
            if split == "none":
                continue
            table, info = _table(folder, place, reading)
            listing = list_table(table, info, place.tree, reading, notes, split=split)
            if listing is None:
                return Listing()
            records += listing.records
            several = several or listing.several
            places.update(dict.fromkeys(listing.places or {split: ""}, shown_path(place.tree, folder.path)))
        return Listing(tuple(records), {}, places, several=several)


def _root(place: Place) -> Folder:
    whole = place.tree.root()
    for folder in whole.walk():
        if folder.file(_STATE) is not None or folder.file(_SPLITS) is not None:
            return folder
        if len(folder.folders) != 1:
            break
    return without_wrapping(whole, Reading())


def _parts(root: Folder) -> list[tuple[str | None, Folder]]:
    """Return the saved datasets in a folder by the name of their split; the name is None for a single one."""
    if root.file(_STATE) is not None and root.file(_INFO) is not None:
        return [(None, root)]
    if root.file(_SPLITS) is None:
        return []
    return [(folder.name, folder) for folder in root.folders if folder.file(_STATE) is not None]


def _split_of(name: str | None, folder: Folder, place: Place, reading: Reading, notes: Notes) -> Any:
    if name is None:
        return None
    meaning = split_meaning(name, reading.splits)
    if meaning is None:
        notes.problem(
            shown_path(place.tree, folder.path),
            f"the split {name!r} is not train, val or test; say what it is, for example --set 'data.splits={{{name}: train}}'",
        )
        return None
    return "none" if meaning.meaning == "none" else meaning.split


def _table(folder: Folder, place: Place, reading: Reading) -> tuple[Table, Node]:
    """Return the rows of all Arrow files of one saved dataset, and the file that describes them."""
    require_pyarrow()
    info, state = folder.file(_INFO), folder.file(_STATE)
    assert info is not None
    assert state is not None
    shards = _shards(read_document(state), folder)
    features = _features(read_document(info))
    paths = [local_path(node, reading) for node in shards]
    shown = [printable(node.path) for node in shards]
    columns = _columns(paths[0], shown[0])

    def rows() -> Iterator[Row]:
        for path, name in zip(paths, shown, strict=True):
            yield from _rows(path, name, columns, features)

    return Table(tuple(columns), rows), info


def _shards(state: Any, folder: Folder) -> list[Node]:
    try:
        names = [str(one["filename"]) for one in state["_data_files"]]
    except (KeyError, TypeError):
        raise DataError(f"{printable(folder.path)}/{_STATE}: does not name its Arrow files") from None
    if state.get("_indices_files"):
        raise DataError(
            f"{printable(folder.path)}: the saved dataset has an index beside its rows; flatten_indices() and save again"
        )
    nodes = [node for name in names if (node := folder.file(name)) is not None]
    if len(nodes) < len(names) or not nodes:
        raise DataError(f"{printable(folder.path)}: Arrow files that {_STATE} names are missing")
    return nodes


def _features(info: Any) -> Mapping[str, Sequence[str]]:
    features = info.get("features") if isinstance(info, Mapping) else None
    return class_names(features) if isinstance(features, Mapping) else {}


@lru_cache(maxsize=64)
def _opened(path: Path, state: str | None) -> Any:
    """Return an Arrow file as a table in shared memory, whose offsets have been checked.

    Arrow does not check the offsets in a file, so a damaged or malicious file could make it read outside of its buffers.

    Raises:
        pyarrow.ArrowInvalid: it is damaged.
    """
    pyarrow = require_pyarrow()
    source = pyarrow.memory_map(str(path))
    try:
        table = pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        table = pyarrow.ipc.open_file(source).read_all()
    table.validate(full=True)
    return table


def _columns(path: Path, shown: str) -> dict[str, bool]:
    """Return the names of the columns, and whether each holds images."""
    with parquet_errors_named(shown):
        table = _opened(path, state_of(path))
        return {field.name: _is_image_column(field, table) for field in table.schema}


def _is_image_column(field: Any, table: Any) -> bool:
    if is_image_struct(field.type):
        return True
    if not holds_images(field.type):
        return False
    first = table.column(field.name).slice(0, 32).to_pylist()
    return any(looks_like_image(value[:HEAD_BYTES]) for value in first if value)


def _rows(path: Path, shown: str, columns: Mapping[str, bool], features: Mapping[str, Sequence[str]]) -> Iterator[Row]:
    with parquet_errors_named(shown):
        table = _opened(path, state_of(path))
        plain = [name for name, is_image in columns.items() if not is_image]
        structs = [name for name, is_image in columns.items() if is_image and is_image_struct(table.schema.field(name).type)]
        names = {name: _field(table, name, "path") for name in structs}
        has_bytes = {name: _field(table, name, "bytes", is_there=True) for name in structs}
        small = table.select(plain)
        for start in range(0, table.num_rows, 1024):
            for offset, given in enumerate(small.slice(start, 1024).to_pylist()):
                row = start + offset
                cells = {name: as_cell(value, features.get(name)) for name, value in given.items()}
                for name, is_image in columns.items():
                    if is_image:
                        called = names[name][row] if name in names else None
                        embedded = name not in has_bytes or has_bytes[name][row]
                        cells[name] = EmbeddedCell(InArrow(path, shown, name, row), called) if embedded else called
                yield Row(f"{shown}, row {row + 1}", cells)


def _field(table: Any, column: str, name: str, *, is_there: bool = False) -> list[Any]:
    """Return one field of a column of structs, of all rows; with `is_there` only whether each is not null."""
    import pyarrow.compute as compute

    values = compute.struct_field(table.column(column), name)
    result: list[Any] = (compute.is_valid(values) if is_there else values).to_pylist()
    return result


@dataclass(frozen=True, slots=True)
class InArrow(ImageCell):
    """The bytes of an image in an Arrow file, which is memory-mapped."""

    def read(self, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
        with _READING:  # the opened files are shared between threads
            table = _opened(self.table, state_of(self.table))
        try:
            data = image_bytes(table.column(self.column)[self.row].as_py())
        except (ValueError, IndexError, KeyError) as error:
            raise ImageError(f"the cell cannot be read: {error}") from None
        if data is None:
            raise ImageError("the cell is empty: the table holds no bytes for this image")
        check_bytes(len(data), limits)
        return data


_READING = threading.Lock()
