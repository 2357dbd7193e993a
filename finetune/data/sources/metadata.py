"""A folder of images with a table in it: the image folder of the datasets library, and the like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from finetune.data.dataset import Split
from finetune.data.layout import Layout, find_layout, without_wrapping
from finetune.data.notes import Notes
from finetune.data.places.tree import Folder, Node, Place, Tree, shown_path
from finetune.data.reading import Reading
from finetune.data.sources.rows import list_table
from finetune.data.sources.source import Listing, Record
from finetune.data.splits_by_name import split_meaning
from finetune.data.tables import SUFFIXES, open_table
from finetune.errors import DataError
from finetune.messages import natural_list, plural, printable

_DEEPEST = 3  # folders below the root in which a metadata file is looked for


class MetadataSource:
    """``metadata.csv``, ``.jsonl`` or ``.parquet`` beside the images, of all splits or one in each; or one other table."""

    name: ClassVar[str] = "images with a table"

    def expected(self, shown: str) -> str:
        return (
            f"images beside a table {shown}/metadata.csv with a column file_name (paths relative to the table) and a column "
            "label; or one folder per class"
        )

    def recognises(self, place: Place) -> bool:
        return place.focus is None and bool(_tables(place.tree.root(), Reading()))

    def read(self, place: Place, reading: Reading, notes: Notes) -> Listing:
        whole = place.tree.root()
        root = without_wrapping(whole, reading)
        tables = _tables(whole, reading)
        if root is not whole and all(table.node.path.startswith(f"{root.path}/") for table in tables):
            notes.say(f"the folder around everything, {printable(root.path)}/, was left out")
        folders = _Folders.of(place.tree, reading)
        by_convention = all(_is_metadata(table.node) for table in tables)
        if len(tables) > 1 and not by_convention and not all(table.split for table in tables):
            return self._one_of_several(tables, folders, place, reading, notes)
        listing = _merged([_listed(table, place.tree, reading, notes, root, folders) for table in tables])
        if listing is None:
            return Listing()
        if not listing.records and folders.usable and not notes.problems:
            return self._by_folders(tables, place, reading, notes)
        if not by_convention:
            _compare(listing, folders, place.tree, tables, notes)
        return listing

    def _one_of_several(
        self, tables: Sequence[_Table], folders: _Folders, place: Place, reading: Reading, notes: Notes
    ) -> Listing:
        names = natural_list(printable(table.node.path) for table in tables)
        if folders.usable:
            notes.say(f"the tables {names} were left out; give one of them as the data to use it")
            return self._by_folders((), place, reading, notes)
        notes.problem(place.tree.shown, f"several tables: {names}; give the one that is meant as the data")
        return Listing()

    def _by_folders(self, tables: Sequence[_Table], place: Place, reading: Reading, notes: Notes) -> Listing:
        from finetune.data.sources.class_folders import ClassFoldersSource

        if tables:
            names = natural_list(printable(table.node.path) for table in tables)
            notes.say(
                f"{names} has no column of labels, so folder names are the labels; --set data.label_column=NAME names a column"
            )
        return ClassFoldersSource().read(place, reading, notes)


@dataclass(frozen=True)
class _Table:
    node: Node
    split: Split | None


@dataclass(frozen=True)
class _Folders:
    """The splits and labels that the folder names alone give."""

    layout: Layout | None

    @classmethod
    def of(cls, tree: Tree, reading: Reading) -> _Folders:
        aside = Notes()
        layout = find_layout(tree, reading, aside)
        names = {name for by_class in layout.splits.values() for name, nodes in by_class.items() if nodes}
        return cls(None if aside.problems or len(names) < 2 else layout)

    @property
    def usable(self) -> bool:
        """Whether there are class folders beyond doubt."""
        return self.layout is not None

    def labels(self) -> dict[str, str]:
        """Return the class folder of each image, by its path in the tree."""
        if self.layout is None:
            return {}
        by_class = [pair for found in self.layout.splits.values() for pair in found.items()]
        return {node.path: name for name, nodes in by_class for node in nodes}


def _tables(whole: Folder, reading: Reading) -> list[_Table]:
    """Return the metadata files of a tree; where there is none, the tables that lie beside the images, or in the root."""
    root = without_wrapping(whole, reading)
    metadata = [
        _Table(node, _split_around(node.path, reading))
        for folder in root.walk()
        if folder.path.count("/") - root.path.count("/") <= _DEEPEST
        for node in folder.files
        if _is_metadata(node)
    ]
    if metadata:
        return metadata
    around = [whole] if root is whole else [whole, root]
    beside = [node for folder in around for node in folder.files if node.suffix in SUFFIXES]
    return [_Table(node, _certain_split(node.name.rpartition(".")[0], reading)) for node in beside]


def _is_metadata(node: Node) -> bool:
    return node.suffix in SUFFIXES and node.name.rpartition(".")[0].casefold() == "metadata"


def _split_around(path: str, reading: Reading) -> Split | None:
    for part in reversed(path.split("/")[:-1]):
        if (split := _certain_split(part, reading)) is not None:
            return split
    return None


def _certain_split(name: str, reading: Reading) -> Split | None:
    meaning = split_meaning(name, reading.splits)
    return meaning.split if meaning is not None and meaning.certain else None


def _listed(table: _Table, tree: Tree, reading: Reading, notes: Notes, root: Folder, folders: _Folders) -> Listing | None:
    opened = open_table(table.node, reading)
    return list_table(
        opened,
        table.node,
        tree,
        reading,
        notes,
        split=table.split,
        base=root.path,
        label_needed=not folders.usable or reading.columns.label is not None,
    )


def _merged(listings: Sequence[Listing | None]) -> Listing | None:
    """Return several listings as one; None where one of them has failed."""
    whole = [listing for listing in listings if listing is not None]
    if len(whole) < len(listings):
        return None
    records: list[Record] = [record for listing in whole for record in listing.records]
    places = {split: place for listing in whole for split, place in listing.places.items()}
    return Listing(tuple(records), {}, places, several=any(listing.several for listing in whole))


def _compare(listing: Listing, folders: _Folders, tree: Tree, tables: Sequence[_Table], notes: Notes) -> None:
    """Note a problem if a table that the user did not name gives images other labels than their folders do."""
    by_folder = {str(node): label for node, label in folders.labels().items()}
    root = "" if folders.layout is None or not folders.layout.root.path else f"{folders.layout.root.path}/"
    other = [
        record.id
        for record in listing.records
        if (label := by_folder.get(f"{root}{record.id}")) is not None and record.labels != (label,)
    ]
    if other:
        table = printable(tables[0].node.path)
        notes.problem(
            shown_path(tree, tables[0].node.path),
            f"gives {plural(len(other), 'image')} another label than the folder that they are in ({natural_list(other, 3)}). "
            f"Give {tree.shown}/{table} itself as the data to use its labels, or move it away to use the folders",
        )


def damaged(error: DataError) -> str:
    """Return what is wrong with a table, without its name."""
    return error.message.partition(": ")[2] or error.message
