"""The types for an opened place: a tree of folders and files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from finetune.bundle.image_formats import looks_like_image
from finetune.data.files import SourceFile
from finetune.messages import printable

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
        *(".heic", ".heif", ".hif", ".avif"),
    }
)
FOREIGN_IMAGE_SUFFIXES = frozenset(
    {".jxl", ".jp2", ".j2k", ".psd", ".svg", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".eps", ".exr"}
)
_OTHER_SUFFIXES = frozenset(
    {
        *(".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xml", ".yaml", ".yml", ".html", ".htm", ".pdf"),
        *(".zip", ".tar", ".gz", ".tgz", ".rar", ".7z", ".parquet", ".arrow", ".npy", ".npz", ".pkl", ".py", ".ipynb", ".log"),
        *(".mp4", ".mov", ".avi", ".mkv", ".webm", ".mp3", ".wav", ".doc", ".docx", ".xls", ".xlsx", ".db", ".ini", ".lnk"),
    }
)


_SYSTEM_NAMES = frozenset(
    {
        *("__macosx", "lost+found", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "recycler", "system volume information"),
        *("__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@recycle", "@recently-snapshot", "found.000"),
    }
)


def is_system(name: str) -> bool:
    """Return whether a name is hidden, or typical of files that operating systems and programs create."""
    return name.startswith(".") or name.casefold() in _SYSTEM_NAMES


def is_worth_reporting(name: str) -> bool:
    """Return whether it should be reported that a hidden file is left out, because it may be an image."""
    return not name.startswith("._") and f".{name.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES


@dataclass(slots=True)
class Node:
    """A file."""

    name: str
    path: str  # from the tree's root, with forward slashes
    file: SourceFile
    _is_image: bool | None = None

    @property
    def suffix(self) -> str:
        """The suffix of the name in lower case, with its dot; empty if it has none."""
        return f".{self.name.rpartition('.')[2].lower()}" if "." in self.name[1:] else ""

    @property
    def is_image(self) -> bool:
        """Whether it is an image by its suffix or, without a telling suffix, by its first bytes."""
        if self._is_image is None:
            suffix = self.suffix
            if suffix in IMAGE_SUFFIXES or suffix in FOREIGN_IMAGE_SUFFIXES:
                self._is_image = True
            else:
                self._is_image = suffix not in _OTHER_SUFFIXES and looks_like_image(self.file.head())
        return self._is_image

    @property
    def is_foreign(self) -> bool:
        """Whether it has the suffix of an image format that is not supported."""
        return self.suffix in FOREIGN_IMAGE_SUFFIXES


@dataclass(slots=True)
class Folder:
    """A folder with its folders and files, each sorted by name."""

    name: str
    path: str  # from the tree's root; empty for the root
    files: list[Node] = field(default_factory=list)
    folders: list[Folder] = field(default_factory=list)
    unusual: list[tuple[str, str]] = field(default_factory=list)  # what cannot be read: its path, and what is wrong
    left_out: list[str] = field(default_factory=list)  # paths of what systems and programs leave behind

    def walk(self) -> Iterator[Folder]:
        """Yield this folder and all folders inside, in a fixed order."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    def all_files(self) -> Iterator[Node]:
        """Yield every file inside, nested folders included, in a fixed order."""
        for folder in self.walk():
            yield from folder.files

    def has_images(self) -> bool:
        """Whether there is an image anywhere inside."""
        return any(node.is_image for node in self.all_files())

    def folder(self, name: str) -> Folder | None:
        """Return the direct subfolder of this name, or None."""
        return next((folder for folder in self.folders if folder.name == name), None)

    def file(self, name: str) -> Node | None:
        """Return the file of this name directly inside, or None."""
        return next((node for node in self.files if node.name == name), None)


class Tree(Protocol):
    """The protocol for an opened place."""

    @property
    def name(self) -> str:
        """The name for the dataset."""
        ...

    @property
    def shown(self) -> str:
        """The place as it appears in messages."""
        ...

    @property
    def remarks(self) -> Sequence[str]:
        """Sentences on how the place was interpreted when it was opened."""
        ...

    def root(self) -> Folder:
        """Return the root folder; it is listed once.

        Raises:
            DataError: the place cannot be listed.
        """
        ...

    def find(self, path: str) -> Node | None:
        """Return the file at a path from the root, or None; `root` need not have been listed."""
        ...


@dataclass(frozen=True)
class Place:
    """An opened location: a tree and, if the location is a single file, that file."""

    tree: Tree
    focus: Node | None = None
    local: Path | None = None  # where the tree lies, if it is a folder on this disk

    @property
    def shown(self) -> str:
        """The location as it appears in messages."""
        return self.tree.shown if self.focus is None else shown_path(self.tree, self.focus.path)


def build_folder(files: Sequence[tuple[Sequence[str], SourceFile]], folders: Sequence[Sequence[str]] = ()) -> Folder:
    """Return the folder that these paths describe; parent folders need not be listed."""
    root = Folder("", "")
    known: dict[str, Folder] = {"": root}

    def folder_at(parts: Sequence[str]) -> Folder:
        path = "/".join(parts)
        if path not in known:
            above = folder_at(parts[:-1])
            known[path] = Folder(parts[-1], path)
            above.folders.append(known[path])
        return known[path]

    left_out: dict[str, None] = {}
    for parts in folders:
        system = next((depth for depth, part in enumerate(parts, 1) if is_system(part)), None)
        if system is None:
            folder_at(parts)
        else:
            left_out["/".join(parts[:system])] = None
    for parts, file in files:
        system = next((depth for depth, part in enumerate(parts, 1) if is_system(part)), None)
        if system is None:
            folder_at(parts[:-1]).files.append(Node(parts[-1], "/".join(parts), file))
        elif system < len(parts) or is_worth_reporting(parts[-1]):
            left_out["/".join(parts[:system])] = None
    root.left_out += left_out
    for folder in known.values():
        folder.files.sort(key=lambda node: node.name)
        folder.folders.sort(key=lambda inner: inner.name)
    return root


def find_in(folder: Folder, path: str) -> Node | None:
    """Return the file at a path from `folder`."""
    *parts, name = path.split("/")
    for part in parts:
        inner = folder.folder(part)
        if inner is None:
            return None
        folder = inner
    return folder.file(name)


def shown_path(tree: Tree, path: str) -> str:
    """Return a path inside a tree as it appears in messages."""
    return f"{tree.shown}/{printable(path)}" if path else tree.shown
