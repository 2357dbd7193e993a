"""Open a folder on a local disk as a place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.files import LocalFile
from finetune.data.places.tree import Folder, Node, is_system, is_worth_reporting
from finetune.errors import DataError
from finetune.messages import printable

Identity = tuple[int, int]


@dataclass
class LocalFolder:
    """A folder with everything in it. Links are followed, with a guard against loops."""

    path: Path
    roots: tuple[Path, ...] | None = None  # links and tables may lead to files below these; None: anywhere
    remarks: Sequence[str] = ()
    _root: Folder | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.path.resolve().name or "data"

    @property
    def shown(self) -> str:
        return printable(self.path)

    def root(self) -> Folder:
        if self._root is None:
            try:
                self._root = self._listed(self.path, "", "", frozenset())
            except OSError as error:
                raise DataError(f"{self.shown}: cannot be listed: {error.strerror}") from None
        return self._root

    def find(self, path: str) -> Node | None:
        found = Path(os.path.normpath(self.path / path))
        if not os.path.isfile(found) or not self._within_reach(found):
            return None
        return Node(found.name, path, LocalFile(found))

    def _within_reach(self, path: Path) -> bool:
        if self.roots is None:
            return True
        real = os.path.realpath(path)
        return any(Path(real).is_relative_to(os.path.realpath(root)) for root in self.roots)

    def _listed(self, path: Path, name: str, inside: str, above: frozenset[Identity]) -> Folder:
        folder = Folder(name, inside)
        here = _identity(path)
        prefix = f"{inside}/" if inside else ""
        with os.scandir(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            path_inside = f"{prefix}{entry.name}"
            is_link = entry.is_symlink()
            if is_system(entry.name):
                if entry.is_dir() or is_worth_reporting(entry.name):
                    folder.left_out.append(path_inside)
            elif is_link and not self._within_reach(Path(entry.path)):
                folder.unusual.append((path_inside, "a link that leads out of the folders that may be read; copy it there"))
            elif (kind := _kind(entry)) == "folder":
                self._add_folder(folder, entry, path_inside, above | {here})
            elif kind == "file":
                folder.files.append(Node(entry.name, path_inside, LocalFile(Path(entry.path))))
            else:
                folder.unusual.append((path_inside, "a link to a file that does not exist" if is_link else "not a regular file"))
        return folder

    def _add_folder(self, folder: Folder, entry: os.DirEntry[str], inside: str, above: frozenset[Identity]) -> None:
        if entry.is_symlink() and _identity(Path(entry.path)) in above:
            folder.unusual.append((inside, "a link to a folder that contains it, which could be followed without end"))
            return
        try:
            folder.folders.append(self._listed(Path(entry.path), entry.name, inside, above))
        except OSError as error:
            folder.unusual.append((inside, f"cannot be listed: {error.strerror}"))


def image_files(folder: Path) -> list[Path]:
    """Return every image file under `folder`, nested folders included, in a fixed order."""
    found = []
    for node in LocalFolder(folder).root().all_files():
        assert isinstance(node.file, LocalFile)
        if node.is_image:
            found.append(node.file.path)
    return found


def _kind(entry: os.DirEntry[str]) -> str:
    """Return the kind of an entry, after following links."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:  # a link to itself
        return "other"


def _identity(path: Path) -> Identity:
    status = os.stat(path)
    return status.st_dev, status.st_ino
