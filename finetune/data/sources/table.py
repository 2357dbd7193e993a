"""A CSV or TSV table that names an image file and its label in each row; the files lie beside it."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import ClassVar

from finetune.data.dataset import LocalFile, Split
from finetune.data.sources.listing import Listing, Notes, Record
from finetune.messages import natural_list

SUFFIXES = {".csv": ",", ".tsv": "\t"}
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "category", "target")
SPLIT_COLUMN = "split"
_SPLIT_NAMES: dict[str, Split] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class TableSource:
    """Rows of file name and label, with an optional column ``split``. Labels are kept as text: ``007`` stays ``007``."""

    name: ClassVar[str] = "table"

    def expected(self, location: Path) -> str:
        return "a table with a column file_name (paths relative to the table) and a column label, such as daisy/1.jpg,daisy"

    def recognises(self, location: Path) -> bool:
        return location.suffix.lower() in SUFFIXES and location.is_file()

    def read(self, location: Path, base: Path, notes: Notes) -> Listing:
        text = location.read_bytes().decode("utf-8-sig", "surrogateescape")
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=SUFFIXES[location.suffix.lower()])
        columns = list(rows.fieldnames or ())
        file_column = _column(columns, FILE_COLUMNS, "the image file", location, notes)
        label_column = _column(columns, LABEL_COLUMNS, "the label", location, notes)
        splits: dict[Split | None, dict[str, list[Record]]] = {}
        if file_column is None or label_column is None:
            return Listing({}, {})
        for number, row in enumerate(rows, start=2):
            given, label = row.get(file_column) or "", row.get(label_column) or ""
            split = _split_of(row.get(SPLIT_COLUMN), f"{location}, row {number}", notes)
            path = location.parent / given
            if not given or not label:
                notes.problem(f"{location}, row {number}", f"has no {file_column if not given else label_column}")
            elif not path.is_file():
                notes.problem(f"{location}, row {number}", f"{path}: no such file; paths are relative to the table")
            else:
                file_id = os.path.relpath(path, base).replace(os.sep, "/")
                splits.setdefault(split, {}).setdefault(label, []).append(Record(file_id, LocalFile(path), label))
        listed = {split: {label: tuple(found) for label, found in by_class.items()} for split, by_class in splits.items()}
        return Listing(listed, dict.fromkeys(listed, str(location)))


def _column(columns: list[str], accepted: tuple[str, ...], what: str, location: Path, notes: Notes) -> str | None:
    """Return the column that holds `what`; note a problem where none or several do."""
    found = [column for column in columns if column.strip().casefold() in accepted]
    if len(found) == 1:
        return found[0]
    which = f"several columns may hold {what}: {natural_list(found)}" if found else f"no column for {what}"
    notes.problem(location, f"{which}; name one of them {accepted[0]} (the columns are {natural_list(columns, 20) or 'none'})")
    return None


def _split_of(given: str | None, where: str, notes: Notes) -> Split | None:
    if not given:
        return None
    split = _SPLIT_NAMES.get(given.strip().casefold())
    if split is None:
        notes.problem(where, f"split {given!r} is not one of train, val and test")
    return split
