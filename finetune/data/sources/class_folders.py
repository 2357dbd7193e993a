"""Read class folders, with or without splits around them. Labels come from folder names alone."""

from __future__ import annotations

from typing import ClassVar

from finetune.data.dataset import Split
from finetune.data.layout import Layout, find_layout
from finetune.data.notes import Notes
from finetune.data.places.tree import Node, Place, Tree
from finetune.data.reading import Reading
from finetune.data.sources.source import Listing, Record, refuse_columns
from finetune.messages import natural_list, printable


class ClassFoldersSource:
    """The source for class folders; images may be in subfolders of their class folder."""

    name: ClassVar[str] = "class folders"

    def expected(self, shown: str) -> str:
        return (
            f"one folder per class, for example {shown}/daisy/1.jpg and {shown}/rose/2.jpg; or splits with class folders inside, "
            f"for example {shown}/train/daisy/1.jpg and {shown}/val/daisy/2.jpg"
        )

    def recognises(self, place: Place) -> bool:
        return place.focus is None

    def read(self, place: Place, reading: Reading, notes: Notes) -> Listing:
        if place.focus is not None:
            notes.problem(place.shown, f"is neither a folder, a zip or tar, nor a table of images{_what_it_is(place.focus)}")
            return Listing()
        refuse_columns(reading, notes, "class folders")
        layout = find_layout(place.tree, reading, notes)
        records = [
            _record(layout, node, label, split)
            for split, by_class in layout.splits.items()
            for label, nodes in sorted(by_class.items())
            for node in nodes
        ]
        if not records and (packed := _archives_in(place.tree)):
            what = f"no class folders found; archives inside are not opened, so unpack them first: {natural_list(packed)}"
            notes.problem(place.shown, what)
        classes = {split: tuple(sorted(by_class)) for split, by_class in layout.splits.items()}
        return Listing(tuple(records), classes, layout.places)


_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar", ".bz2", ".xz")


def _archives_in(tree: Tree) -> list[str]:
    return [printable(node.path) for node in tree.root().all_files() if node.name.lower().endswith(_ARCHIVES)]


_OTHER_FILES = {
    b"Rar!": "a RAR archive: unpack it, or pack it as a zip",
    b"7z\xbc\xaf": "a 7z archive: unpack it, or pack it as a zip",
    b"BZh": "packed with bzip2: unpack it, or pack it as a zip or tar.gz",
    b"\xfd7zXZ": "packed with xz: unpack it, or pack it as a zip or tar.gz",
    b"\x28\xb5\x2f\xfd": "packed with Zstandard: unpack it, or pack it as a zip or tar.gz",
    b"\xd0\xcf\x11\xe0": "an old Office file: save the table as CSV",
}  # first bytes -> what a file is, and what to do


def _what_it_is(node: Node) -> str:
    """Return a phrase with the kind of a file that cannot be read as data; empty if it is not known."""
    head = node.file.head()
    known = next((what for start, what in _OTHER_FILES.items() if head.startswith(start)), None)
    if known is None and node.suffix == ".json":
        known = "JSON of an unknown form: COCO and Label Studio exports are read, and JSON lines (.jsonl), one object per line"
    if known is None and node.suffix == ".xml":
        known = 'XML of an unknown form: of XML, exports "CVAT for images 1.1" are read'
    return f"; it is {known}" if known else ""


def _record(layout: Layout, node: Node, label: str, split: Split | None) -> Record:
    inside = node.path.removeprefix(f"{layout.root.path}/") if layout.root.path else node.path
    return Record(printable(inside), node.file, (label,), split)
