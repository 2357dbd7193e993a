"""Read CVAT's own XML, "CVAT for images 1.1": the tags of an image become its labels; boxes and outlines are not used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar
from xml.parsers import expat

from finetune.data.dataset import NAMES_NO_FILE, NO_SUCH_FILE, BadImage, Split
from finetune.data.names import class_name
from finetune.data.notes import Notes
from finetune.data.places.tree import Node, Place, shown_path
from finetune.data.reading import Reading
from finetune.data.sources.documents import annotation_files, bytes_of, mentions, split_around
from finetune.data.sources.lookup import Lookup
from finetune.data.sources.source import Listing, Record, refuse_columns
from finetune.data.splits_by_name import split_meaning
from finetune.errors import DataError
from finetune.messages import plural, printable

_SHAPES = frozenset({"box", "polygon", "polyline", "points", "cuboid", "ellipse", "mask", "skeleton"})


class CvatSource:
    """The source for ``annotations.xml``, or one such file for each split, with the images beside it or in ``images/``."""

    name: ClassVar[str] = "a CVAT export"

    def expected(self, shown: str) -> str:
        return 'an export "CVAT for images 1.1" with a tag for each image (<tag label="daisy">), and the images beside it'

    def recognises(self, place: Place) -> bool:
        return any(_is_export(node) for node in annotation_files(place, ".xml"))

    def read(self, place: Place, reading: Reading, notes: Notes) -> Listing:
        refuse_columns(reading, notes, "CVAT exports")
        files = [node for node in annotation_files(place, ".xml") if _is_export(node)]
        records: list[Record] = []
        places: dict[Split | None, str] = {}
        several = False
        for node in files:
            shown = shown_path(place.tree, node.path)
            try:
                images = _images(bytes_of(node))
            except DataError as error:
                notes.problem(shown, error.message)
                continue
            around = split_around(node, reading) if len(files) > 1 or place.focus is None else None
            listed, has_several = _records(images, node, place, around, reading, notes)
            records += listed
            several = several or has_several
            places |= dict.fromkeys([record.split for record in listed] or [around], shown)
        return Listing(tuple(records), {}, places, several=several)


def _is_export(node: Node) -> bool:
    return mentions(node, b"<annotations") and (mentions(node, b"<image ") or mentions(node, b"<track "))


@dataclass
class _Image:
    """One image of an export: its name, its subset, the labels of its tags, and the labels of its shapes."""

    name: str
    subset: str
    tags: dict[str, None] = field(default_factory=dict)
    shapes: list[str] = field(default_factory=list)


class _Parser:
    """Collects the images of a document. A document type declaration is refused, so there are no entities to expand."""

    def __init__(self) -> None:
        self.images: list[_Image] = []
        self.tracks = 0
        self._open: _Image | None = None

    def start(self, element: str, attributes: dict[str, str]) -> None:
        label = class_name(attributes.get("label", ""))
        if element == "image":
            self._open = _Image(attributes.get("name", ""), attributes.get("subset", ""))
            self.images.append(self._open)
        elif element == "track":
            self.tracks += 1
        elif self._open is not None and label.strip() and element == "tag":
            self._open.tags[label] = None
        elif self._open is not None and label.strip() and element in _SHAPES:
            self._open.shapes.append(label)

    def end(self, element: str) -> None:
        if element == "image":
            self._open = None


def _images(document: bytes) -> list[_Image]:
    """Return the images of a document.

    Raises:
        DataError: it is not XML, has a document type declaration, or is an export of a video.
    """

    def refuse(*_: object) -> None:
        raise DataError("has a document type declaration (<!DOCTYPE …>), which CVAT does not write; remove it")

    found = _Parser()
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = found.start, found.end
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(document, True)
    except (expat.ExpatError, LookupError, ValueError) as error:
        raise DataError(f"is not XML: {error}") from None
    if found.tracks and not found.images:
        raise DataError('is an export of a video (<track>); export it from CVAT as "CVAT for images 1.1"')
    return found.images


def _records(
    images: list[_Image], node: Node, place: Place, around: Split | None, reading: Reading, notes: Notes
) -> tuple[list[Record], bool]:
    """Return the samples of one export, and whether images have several labels.

    If no image has a tag, the labels of the shapes are used.
    """
    shown = printable(node.path)
    tagged = any(image.tags for image in images)
    n_shapes = sum(len(image.shapes) for image in images)
    if n_shapes and tagged:
        notes.say(f"{shown}: {plural(n_shapes, 'shape')} not used; the tags of an image are its labels")
    elif n_shapes:
        notes.say(f"{shown}: no image has a tag, so the labels of its shapes are its labels; where they lie is not used")
    labels_of = [tuple(image.tags if tagged else dict.fromkeys(image.shapes)) for image in images]
    several = any(len(labels) > 1 for labels in labels_of)
    lookup = Lookup(place.tree, node.path.rpartition("/")[0])
    records, unlabelled = [], 0
    for image, labels in zip(images, labels_of, strict=True):
        if not labels and not several:
            unlabelled += 1
            continue
        file = lookup.find(image.name) if image.name else None
        if file is None:
            what = f"{NO_SUCH_FILE}; export with images, or put them beside the export" if image.name else NAMES_NO_FILE
            notes.bad.append(BadImage(f"{shown}: {printable(image.name or 'an image')}", what))
            continue
        meaning = split_meaning(image.subset, reading.splits)
        split = meaning.split if meaning is not None and meaning.certain else around
        records.append(Record(printable(file.path), file.file, labels, split))
    if unlabelled:
        notes.left_out.append(f"{shown}: {plural(unlabelled, 'image')} without an annotation left out")
    lookup.say(notes)
    return records, several
