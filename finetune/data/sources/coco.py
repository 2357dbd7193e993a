"""Read COCO annotations: the categories of an image become its labels; boxes and outlines are not used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar

from finetune.data.dataset import NO_SUCH_FILE, BadImage, Split
from finetune.data.names import class_name
from finetune.data.notes import Notes
from finetune.data.places.tree import Node, Place, shown_path
from finetune.data.reading import Reading
from finetune.data.sources.documents import json_files, mentions, read_document, split_around, text_of
from finetune.data.sources.lookup import Lookup
from finetune.data.sources.source import Listing, Record, refuse_columns
from finetune.errors import DataError
from finetune.messages import plural, printable

_WORDS = (b'"images"', b'"annotations"', b'"categories"')


class CocoSource:
    """The source for COCO: one annotation file, or one for each split, with the images beside it or in ``images/``."""

    name: ClassVar[str] = "COCO annotations"

    def expected(self, shown: str) -> str:
        return 'a JSON file with "images" (id, file_name), "categories" (id, name) and "annotations" (image_id, category_id)'

    def recognises(self, place: Place) -> bool:
        return any(mentions(node, *_WORDS) for node in json_files(place))

    def read(self, place: Place, reading: Reading, notes: Notes) -> Listing:
        refuse_columns(reading, notes, "COCO files")
        files = [node for node in json_files(place) if mentions(node, *_WORDS)]
        records: list[Record] = []
        places: dict[Split | None, str] = {}
        several = False
        for node in files:
            split = split_around(node, reading) if len(files) > 1 or place.focus is None else None
            try:
                document = _Document(read_document(node), node)
            except (DataError, ValueError, TypeError, AttributeError, KeyError) as error:
                notes.problem(shown_path(place.tree, node.path), _why(error))
                continue
            listed, has_several = document.records(Lookup(place.tree, node.path.rpartition("/")[0]), split, notes)
            records += listed
            several = several or has_several
            places[split] = shown_path(place.tree, node.path)
        return Listing(tuple(records), {}, places, several=several)


def _why(error: Exception) -> str:
    if isinstance(error, DataError):
        return error.message.partition(": ")[2] or error.message
    return f"is not valid COCO ({type(error).__name__}: {error})"


class _Document:
    """One annotation file, checked."""

    def __init__(self, document: Any, node: Node) -> None:
        self.node = node
        names = {_id(category): text_of(category["name"]) for category in _list(document, "categories")}
        self.names = {key: class_name(name) for key, name in names.items() if name is not None}
        self.images = [(_id(image), str(image["file_name"])) for image in _list(document, "images")]
        self.labels: dict[str, dict[str, None]] = defaultdict(dict)
        self.n_boxes = 0
        for annotation in _list(document, "annotations"):
            category = json_id(annotation["category_id"])
            if category not in self.names:
                raise DataError(f": an annotation has the category {category}, which is not among the categories")
            self.labels[json_id(annotation["image_id"])][self.names[category]] = None
            self.n_boxes += bool(annotation.get("bbox"))

    def records(self, lookup: Lookup, split: Split | None, notes: Notes) -> tuple[list[Record], bool]:
        """Return the samples, and whether images have several labels."""
        several = any(len(labels) > 1 for labels in self.labels.values())
        if self.n_boxes:
            notes.say(f"{printable(self.node.name)}: {plural(self.n_boxes, 'box')} not used; only the categories of an image are")
        records, unlabelled = [], 0
        for image_id, name in self.images:
            labels = tuple(self.labels.get(image_id, ()))
            if not labels and not several:
                unlabelled += 1
                continue
            node = lookup.find(name)
            if node is None:
                notes.bad.append(BadImage(f"{printable(self.node.path)}: {printable(name)}", NO_SUCH_FILE))
                continue
            records.append(Record(printable(node.path), node.file, labels, split))
        if unlabelled:
            notes.left_out.append(f"{printable(self.node.path)}: {plural(unlabelled, 'image')} without an annotation left out")
        lookup.say(notes)
        return records, several


def _list(document: Any, key: str) -> list[Any]:
    value = document[key]
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise DataError(f': "{key}" must be a list of objects')
    return value


def _id(thing: Mapping[str, Any]) -> str:
    return json_id(thing["id"])


def json_id(value: Any) -> str:
    """Return an id as text; tools write ids as numbers or texts."""
    return str(value)
