"""Convert the rows of a table to records, for every source with a table."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from finetune.data.dataset import NAMES_NO_FILE, NO_SUCH_FILE, BadImage, Split
from finetune.data.files import ImageFile
from finetune.data.names import class_name
from finetune.data.notes import Notes
from finetune.data.places.tree import Node, Tree, shown_path
from finetune.data.reading import Reading
from finetune.data.sources.columns import TRUE, Found, find_columns
from finetune.data.sources.lookup import Lookup
from finetune.data.sources.source import Listing, Record
from finetune.data.splits_by_name import Meaning, split_meaning
from finetune.data.tables import Cell, Row, Table
from finetune.messages import natural_list, plural, printable


@dataclass
class _RowProblems:
    """The rows with a problem, by kind."""

    rows: int = 0
    unlabelled: int = 0
    repeated: int = 0
    without_file: list[str] = field(default_factory=list)
    unknown_splits: Counter[str] = field(default_factory=Counter)
    uncertain_splits: dict[str, str] = field(default_factory=dict)  # cell -> the split that it probably means
    wrong_weights: list[str] = field(default_factory=list)


def list_table(
    table: Table,
    node: Node,
    tree: Tree,
    reading: Reading,
    notes: Notes,
    *,
    split: Split | None = None,
    base: str | None = None,
    label_needed: bool = True,
) -> Listing | None:
    """List the samples of a table; return None if its columns are not known, which is noted as a problem.

    Args:
        node: the table's file; paths in it are relative to its folder.
        split: the split of all rows, if the name or folder of the table determines it.
        base: the folder that ids are counted from; by default the table's.
        label_needed: whether a table without labels is a problem; otherwise it lists nothing.
    """
    folder = node.path.rpartition("/")[0]
    lookup = Lookup(tree, folder)
    shown = shown_path(tree, node.path)
    for sentence in table.remarks:
        notes.say(sentence)
    columns = find_columns(
        table,
        shown,
        reading,
        notes,
        lambda cell: _holds_image(cell, lookup),
        lambda cell: isinstance(cell, str) and lookup.find(cell, tried=True) is not None,
        label_needed=label_needed,
    )
    if columns is None or columns.label is None:
        return None if columns is None else Listing()
    reader = _Rows(columns, lookup, reading, notes, split, folder if base is None else base, node)
    records = reader.records(table)
    reader.note_problems(shown)
    lookup.say(notes)
    places = dict.fromkeys(sorted({record.split for record in records}, key=str), shown)
    return Listing(tuple(records), {}, places, several=reader.several)


def _holds_image(cell: Cell, lookup: Lookup) -> bool:
    if isinstance(cell, str):
        return lookup.find(cell, by_stem=False) is not None
    return cell is not None and not isinstance(cell, Sequence)


class _Rows:
    def __init__(
        self, columns: Found, lookup: Lookup, reading: Reading, notes: Notes, split: Split | None, base: str, node: Node
    ) -> None:
        self.columns, self.lookup, self.reading, self.notes = columns, lookup, reading, notes
        self.split, self.base, self.node = split, base, node
        self.several = reading.columns.label_separator is not None
        self.found = _RowProblems()

    def records(self, table: Table) -> list[Record]:
        """Return the samples of all rows that have a file and a label."""
        records: list[Record] = []
        first: dict[str, tuple[Record, str]] = {}
        for row in table.rows():
            record = self._record(row)
            if record is None:
                continue
            seen, place = first.setdefault(record.id, (record, row.place))
            if seen is record:
                records.append(record)
            elif (seen.labels, seen.split) == (record.labels, record.split):
                self.found.repeated += 1
            else:
                self._note_contradiction(record, row.place, seen, place)
        if not records and not first and not self.found.rows:
            self.notes.problem(shown_path(self.lookup.tree, self.node.path), "has a header and no rows")
        lists = [_as_list(record.labels) for record in records]
        if records and not self.several and all(labels is not None for labels in lists):
            self.several = True
            records = [
                Record(record.id, record.file, tuple(labels or ()), record.split, record.group, record.weight)
                for record, labels in zip(records, lists, strict=True)
            ]
        return records

    def _record(self, row: Row) -> Record | None:
        assert self.columns.label is not None
        self.found.rows += 1
        labels = self._labels(row.cells.get(self.columns.label))
        if labels is None:
            self.found.unlabelled += 1
            return None
        meaning = self._split_of(row)
        if meaning is not None and meaning.meaning == "none":
            return None
        found = self._file(row)
        if found is None:
            return None
        name, file = found
        group = row.cells.get(self.columns.group) if self.columns.group is not None else None
        split = None if meaning is None else meaning.split
        return Record(name, file, labels, split or self.split, group if isinstance(group, str) else None, self._weight(row))

    def _labels(self, cell: Cell) -> tuple[str, ...] | None:
        separator = self.reading.columns.label_separator
        if isinstance(cell, str):
            if separator is None:
                return (class_name(cell),) if cell.strip() else None
            return tuple(dict.fromkeys(class_name(part.strip()) for part in cell.split(separator) if part.strip()))
        if isinstance(cell, Sequence):
            self.several = True
            return tuple(dict.fromkeys(map(class_name, cell)))
        return None

    def _split_of(self, row: Row) -> Meaning | None:
        cell = row.cells.get(self.columns.split) if self.columns.split is not None else None
        if not isinstance(cell, str):
            return None
        if self.columns.flags_val:
            return Meaning("val" if cell.lower() in TRUE else "train", certain=True)
        meaning = split_meaning(cell, self.reading.splits)
        if meaning is None:
            self.found.unknown_splits[cell] += 1
        elif not meaning.certain:
            self.found.uncertain_splits[cell] = meaning.meaning
        return meaning

    def _file(self, row: Row) -> tuple[str, ImageFile] | None:
        cell = row.cells.get(self.columns.file)
        if isinstance(cell, str):
            node = self.lookup.find(cell)
            if node is not None:
                return self._id_of(node), node.file
            self.notes.bad.append(BadImage(f"{row.place}: {printable(cell)}", NO_SUCH_FILE))
            self.found.without_file.append(printable(cell))
            return None
        if cell is None or isinstance(cell, Sequence):
            self.found.without_file.append(row.place)
            self.notes.bad.append(BadImage(row.place, NAMES_NO_FILE))
            return None
        return printable(cell.name) if cell.name else row.place, cell.file

    def _id_of(self, node: Node) -> str:
        inside = f"{self.base}/" if self.base else ""
        return printable(node.path.removeprefix(inside))

    def _weight(self, row: Row) -> float:
        if self.columns.weight is None:
            return 1.0
        cell = row.cells.get(self.columns.weight)
        try:
            weight = float(cell) if isinstance(cell, str) else math.nan
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            self.found.wrong_weights.append(
                f"{row.place} ({printable(cell)!r})" if isinstance(cell, str) else f"{row.place} (empty)"
            )
            return 1.0
        return weight

    def _note_contradiction(self, record: Record, place: str, seen: Record, seen_at: str) -> None:
        """Note a problem with two rows that differ on the same file."""
        what = "label" if record.labels != seen.labels else "split"
        here, there = (natural_list(one.labels) if what == "label" else one.split for one in (record, seen))
        row = seen_at.rpartition(", ")[2]
        self.notes.problem(place, f"{record.id} has the {what} {here!r} here and {there!r} in {row}")

    def note_problems(self, shown: str) -> None:
        """Note the problems and warnings about rows."""
        if self.found.unlabelled:
            self.notes.left_out.append(f"{shown}: {plural(self.found.unlabelled, 'row')} without a label left out")
        if self.found.repeated:
            self.notes.left_out.append(f"{shown}: {plural(self.found.repeated, 'row')} that repeat another one, left out")
        if self.found.unknown_splits:
            values = natural_list(repr(printable(value)) for value in self.found.unknown_splits)
            guess = next(iter(self.found.unknown_splits))
            self.notes.problem(
                shown,
                f"the split column {self.columns.split!r} holds {values}, which are not train, val or test; say what they mean "
                f"with data.splits, for example --set 'data.splits={{{printable(guess)}: train}}'",
            )
        if self.found.uncertain_splits:
            read = natural_list(f"{printable(cell)!r} is {split}" for cell, split in sorted(self.found.uncertain_splits.items()))
            self.notes.say(f"{shown}: the split column {self.columns.split!r}: {read}; data.splits says otherwise")
        self.notes.many(shown, self.found.wrong_weights, "weights must be numbers from 0 up")


def _as_list(labels: Iterable[str]) -> list[str] | None:
    """Return the labels in a text that is a JSON list of texts, as this project writes them; None if it is not."""
    text = next(iter(labels), "")
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and all(isinstance(one, str) for one in value) else None
