"""One folder of images for each class; or splits with class folders inside. Labels come from folder names alone."""

from __future__ import annotations

from typing import ClassVar

from finetune.data.dataset import Split
from finetune.data.layout import Layout, understand
from finetune.data.notes import Notes
from finetune.data.places.tree import Node, Place
from finetune.data.reading import Reading
from finetune.data.sources.source import Listing, Record, refuse_columns
from finetune.messages import printable


class ClassFoldersSource:
    """Class folders in any place; images may lie in folders nested inside their class folder."""

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
            notes.problem(place.shown, "is no folder, no zip or tar, and no table of images")
            return Listing()
        refuse_columns(reading, notes, "class folders")
        layout = understand(place.tree, reading, notes)
        records = [
            _record(layout, node, label, split)
            for split, by_class in layout.splits.items()
            for label, nodes in sorted(by_class.items())
            for node in nodes
        ]
        classes = {split: tuple(sorted(by_class)) for split, by_class in layout.splits.items()}
        return Listing(tuple(records), classes, layout.places)


def _record(layout: Layout, node: Node, label: str, split: Split | None) -> Record:
    inside = node.path.removeprefix(f"{layout.root.path}/") if layout.root.path else node.path
    return Record(printable(inside), node.file, (label,), split)
