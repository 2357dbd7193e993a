"""A CSV or TSV table that names an image file and its label in each row; the files lie beside it."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from finetune.data.dataset import LocalFile, Split
from finetune.data.sources.listing import SPLIT_NAMES, Listing, Notes, Record, class_name, note_look_alikes
from finetune.messages import natural_list, plural, printable

SUFFIXES = {".csv": ",", ".tsv": "\t"}
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "category", "target")
SPLIT_COLUMNS = ("split",)


class TableSource:
    """Rows of file name and label, with an optional column ``split``. Labels are kept as text: ``007`` stays ``007``."""

    name: ClassVar[str] = "table"

    def expected(self, location: Path) -> str:
        return "a table with a column file_name (paths relative to the table) and a column label, such as daisy/1.jpg,daisy"

    def recognises(self, location: Path) -> bool:
        return location.suffix.lower() in SUFFIXES and location.is_file()

    def read(self, location: Path, base: Path, notes: Notes) -> Listing:
        found: dict[Split | None, dict[str, list[Record]]] = {}
        seen: dict[str, _Row] = {}
        n_repeated = 0
        for row in _rows(location, notes):
            path = location.parent / row.file
            if not path.is_file():
                notes.problem(row.where, f"{path}: no such file; paths are relative to the table")
                continue
            file_id = os.path.relpath(path, base).replace(os.sep, "/")
            first = seen.setdefault(file_id, row)
            if first is not row:
                n_repeated += (first.label, first.split) == (row.label, row.split)
                _note_contradiction(row, first, notes)
                continue
            found.setdefault(row.split, {}).setdefault(row.label, []).append(Record(file_id, LocalFile(path), row.label))
        if n_repeated:
            notes.left_out.append(f"{printable(location)}: {plural(n_repeated, 'row')} that repeat another one, left out")
        note_look_alikes(sorted({label for by_class in found.values() for label in by_class}), location, "labels", notes)
        listed = {split: {label: tuple(records) for label, records in by_class.items()} for split, by_class in found.items()}
        return Listing(listed, dict.fromkeys(listed, str(location)))


@dataclass(frozen=True)
class _Row:
    """One row that is complete."""

    where: str
    file: str
    label: str
    split: Split | None


def _rows(location: Path, notes: Notes) -> Iterator[_Row]:
    """Yield the rows; note a problem for each that lacks something."""
    text = location.read_bytes().decode("utf-8-sig", "surrogateescape")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=SUFFIXES[location.suffix.lower()])
    try:
        columns = list(reader.fieldnames or ())
        file_column = _column(columns, FILE_COLUMNS, "the image file", location, notes)
        label_column = _column(columns, LABEL_COLUMNS, "the label", location, notes)
        split_column = _named(columns, SPLIT_COLUMNS)
        if file_column is None or label_column is None:
            return
        number = 1
        for number, given in enumerate(reader, start=2):
            row = _complete(given, f"{location}, row {number}", file_column, label_column, split_column, notes)
            if row is not None:
                yield row
        if number == 1:
            notes.problem(location, "has a header and no rows")
    except csv.Error as error:
        notes.problem(f"{location}, line {reader.line_num}", f"cannot be read as a table: {error}")


def _complete(
    given: Mapping[str | None, str | None], where: str, file_column: str, label_column: str, splits: list[str], notes: Notes
) -> _Row | None:
    """Return a row with all that it needs; None, with a problem noted, where something is missing or wrong."""
    file, label = given.get(file_column) or "", class_name(given.get(label_column) or "")
    split_name = (given.get(splits[0]) or "").strip() if splits else ""
    split = SPLIT_NAMES.get(split_name.casefold())
    if None in given:
        notes.problem(where, "has more fields than the header; put quotes around a name with a separator in it")
    elif not file or not label:
        notes.problem(where, f"has no {file_column if not file else label_column}")
    elif printable(label) != label:
        notes.problem(where, "a label with undecodable bytes or control characters; save the table as UTF-8")
    elif split_name and split is None:
        notes.problem(where, f"split {split_name!r} is not one of train, val and test")
    else:
        return _Row(where, file, label, split)
    return None


def _note_contradiction(row: _Row, first: _Row, notes: Notes) -> None:
    """Note a problem where two rows say different things of one file."""
    for what, here, there in (("label", row.label, first.label), ("split", row.split, first.split)):
        if here != there:
            elsewhere = first.where.rpartition(", ")[2]
            notes.problem(row.where, f"{row.file} has the {what} {here!r} here and {there!r} in {elsewhere}")


def _column(columns: list[str], accepted: tuple[str, ...], what: str, location: Path, notes: Notes) -> str | None:
    """Return the column that holds `what`; note a problem where none or several do."""
    found = _named(columns, accepted)
    if len(found) == 1:
        return found[0]
    which = f"several columns may hold {what}: {natural_list(found)}" if found else f"no column for {what}"
    notes.problem(location, f"{which}; name one of them {accepted[0]} (the columns are {natural_list(columns, 20) or 'none'})")
    return None


def _named(columns: list[str], accepted: tuple[str, ...]) -> list[str]:
    """Return the columns that have one of the accepted names, whatever their case."""
    return [column for column in columns if column.strip().casefold() in accepted]
