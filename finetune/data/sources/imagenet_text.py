"""Read ImageNet's text layout, which CVAT exports: ``synsets.txt`` with the classes, and a list of files for each subset."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from finetune.data.dataset import NO_SUCH_FILE, BadImage, Split
from finetune.data.layout import without_wrapping
from finetune.data.names import class_name
from finetune.data.notes import Notes
from finetune.data.places.tree import Folder, Node, Place, shown_path
from finetune.data.reading import Reading
from finetune.data.sources.documents import split_around
from finetune.data.sources.lookup import Lookup
from finetune.data.sources.source import Listing, Record, refuse_columns
from finetune.data.tables.rows import WHOLE_FILE
from finetune.errors import ImageError
from finetune.messages import natural_list, plural, printable

_CLASSES = "synsets.txt"
_LINE = re.compile(r'^(?:"(?P<quoted>[^"]*)"|(?P<plain>\S.*?))(?P<numbers>(?:\s+\d+)+)\s*$')


class ImagenetTextSource:
    """The source for ``synsets.txt`` with lists of ``path number`` lines; images are beside them, or in ``images/``."""

    name: ClassVar[str] = "ImageNet lists"

    def expected(self, shown: str) -> str:
        return f"{shown}/{_CLASSES} with a class in each line, and a list such as {shown}/train.txt with lines like 1.jpg 0"

    def recognises(self, place: Place) -> bool:
        folder = None if place.focus is not None else _folder(place)
        return folder is not None and bool(_lists(folder))

    def read(self, place: Place, reading: Reading, notes: Notes) -> Listing:
        refuse_columns(reading, notes, "lists of files")
        folder = _folder(place)
        assert folder is not None
        classes_file = folder.file(_CLASSES)
        assert classes_file is not None
        classes = [class_name(line) for line in _lines(classes_file, place, notes)]
        lookup = Lookup(place.tree, folder.path)
        records: list[Record] = []
        places: dict[Split | None, str] = {}
        lists = _lists(folder)
        for node in lists:
            split = split_around(node, reading)
            places[split] = shown_path(place.tree, node.path)
            records += _records(node, classes, split, lookup, place, notes)
        lookup.say(notes)
        return Listing(tuple(records), {}, places, several=any(len(record.labels) != 1 for record in records))


def _folder(place: Place) -> Folder | None:
    whole = place.tree.root()
    root = without_wrapping(whole, Reading())
    return next((folder for folder in (whole, root) if folder.file(_CLASSES) is not None), None)


def _lists(folder: Folder) -> list[Node]:
    """Return the lists: text files beside ``synsets.txt`` whose first line is a path and a number."""
    found = []
    for node in folder.files:
        if node.suffix == ".txt" and node.name != _CLASSES:
            first = node.file.head().decode("utf-8", "replace").partition("\n")[0]
            if _LINE.match(first) is not None:
                found.append(node)
    return found


def _lines(node: Node, place: Place, notes: Notes) -> Sequence[str]:
    try:
        text = node.file.read(WHOLE_FILE).decode("utf-8-sig")
    except (ImageError, UnicodeDecodeError) as error:
        notes.problem(shown_path(place.tree, node.path), f"cannot be read as text: {error}")
        return ()
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _records(node: Node, classes: Sequence[str], split: Split | None, lookup: Lookup, place: Place, notes: Notes) -> list[Record]:
    shown = shown_path(place.tree, node.path)
    records: list[Record] = []
    wrong: list[str] = []
    unlabelled = 0
    for number, line in enumerate(_lines(node, place, notes), start=1):
        match = _LINE.match(line.strip())
        numbers = [] if match is None else [int(one) for one in match["numbers"].split()]
        if match is None:
            unlabelled += 1
            continue
        if any(one >= len(classes) for one in numbers):
            wrong.append(f"line {number} ({natural_list(numbers)})")
            continue
        name = match["quoted"] if match["quoted"] is not None else match["plain"]
        found = lookup.find(name)
        if found is None:
            notes.bad.append(BadImage(f"{shown}, line {number}: {printable(name)}", NO_SUCH_FILE))
            continue
        records.append(Record(printable(found.path), found.file, tuple(dict.fromkeys(classes[one] for one in numbers)), split))
    notes.many(shown, wrong, f"class numbers beyond the {plural(len(classes), 'class')} of {_CLASSES}")
    if unlabelled:
        notes.left_out.append(f"{shown}: {plural(unlabelled, 'line')} without a class number left out")
    return records
