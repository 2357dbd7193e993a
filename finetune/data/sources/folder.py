"""A folder of labelled photographs: one folder for each class, or ``train`` / ``val`` / ``test`` folders of class folders.

Labels come from folder names alone. No file is opened: whether an image decodes, and which bytes occur twice, is found by
`finetune.data.check`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

from finetune.data.dataset import SPLITS, BadImage, LocalFile, Split
from finetune.data.sources.listing import SPLIT_NAMES, Listing, Notes, Record, class_name, note_look_alikes
from finetune.messages import natural_list, plural, printable

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"})
FOREIGN_IMAGE_SUFFIXES = frozenset(
    {
        ".heic",
        ".heif",
        ".avif",
        ".jxl",
        ".jp2",
        ".j2k",
        ".psd",
        ".svg",
        ".dng",
        ".raw",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".orf",
        ".rw2",
    }
)
JUNK = frozenset({"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})


class FolderSource:
    """Class folders, or split folders of them; images may lie in folders nested inside their class folder."""

    name: ClassVar[str] = "folder"

    def expected(self, location: Path) -> str:
        name = printable(location)
        return (
            f"one folder per class, for example {name}/daisy/1.jpg and {name}/rose/2.jpg; or splits with class folders inside, "
            f"for example {name}/train/daisy/1.jpg and {name}/val/daisy/2.jpg"
        )

    def recognises(self, location: Path) -> bool:
        return location.is_dir()

    def read(self, location: Path, base: Path, notes: Notes) -> Listing:
        if not _is_folder(location, notes):
            return Listing({}, {})
        folder = location.resolve()
        folders: dict[Split | None, Path] = {**_splits_inside(folder, notes)} or {None: folder}
        found = {split: _scan_split(path, folder, base, notes) for split, path in folders.items()}
        return Listing(found, {split: str(path) for split, path in folders.items()})


def image_files(folder: Path) -> list[Path]:
    """Return every file under `folder` that is named like an image, nested folders included, in a fixed order."""
    return [path for path in _walk(folder, Notes()) if _is_image_name(path)]


def _is_folder(path: Path, notes: Notes) -> bool:
    if path.is_dir():
        return True
    if path.exists():
        notes.problem(path, "is a file, not a folder of images; unpack an archive first")
    else:
        notes.problem(path, "no such folder")
    return False


def _splits_inside(training: Path, notes: Notes) -> dict[Split | None, Path]:
    """Return the train, val and test folders of the second layout; an empty mapping for the first.

    A class may be called "train" (beside "plane" and "car"): a folder of that name is taken for a split only when it has
    folders of its own, or when every folder beside it is named like a split too.
    """
    files, folders = _listing(training, notes)
    named: dict[Split, list[Path]] = defaultdict(list)
    for path in folders:
        if split := SPLIT_NAMES.get(path.name.casefold()):
            named[split].append(path)
    others = [path for path in folders if path.name.casefold() not in SPLIT_NAMES]
    nested = any(_listing(path, notes)[1] for path in named["train"])
    if not any(named.values()) or (others and not nested):
        return {}
    for split, paths in named.items():
        if len(paths) > 1:
            notes.problem(training, f"{_slashed(paths)} both mean {split}; keep one of them")
    if not named["train"]:
        notes.problem(training, f"has {_slashed(path for paths in named.values() for path in paths)} but no train/ folder")
    _note_loose_images(training, files, notes)
    for path in others:
        _note_stray_folder(path, notes)
    return {split: named[split][0] for split in SPLITS if named[split]}


def _slashed(folders: Iterable[Path]) -> str:
    return " and ".join(f"{path.name}/" for path in folders)


def _note_loose_images(folder: Path, files: Iterable[Path], notes: Notes) -> None:
    loose = [printable(path.name) for path in files if _is_image_name(path)]
    if loose:
        notes.problem(folder, f"{plural(len(loose), 'image')} in no class folder, so without a label: {natural_list(loose)}")


def _note_stray_folder(folder: Path, notes: Notes) -> None:
    n_images = sum(_is_image_name(path) for path in _walk(folder, notes))
    if n_images:
        notes.problem(folder, f"{plural(n_images, 'image')} in a folder beside train/ that is not named train, val or test")
    else:
        notes.left_out.append(f"{printable(folder)}: a folder without images beside train/, left out")


def _scan_split(folder: Path, root: Path, base: Path, notes: Notes) -> dict[str, tuple[Record, ...]]:
    """List the image files by class name in one folder of class folders; links may lead anywhere inside `root`."""
    files, class_folders = _listing(folder, notes)
    _note_loose_images(folder, files, notes)
    by_class: dict[str, tuple[Record, ...]] = {}
    spelled: list[str] = []
    for class_folder in class_folders:
        if printable(class_folder.name) != class_folder.name:
            notes.problem(class_folder, "a class name with undecodable bytes or control characters; rename the folder")
            continue
        name = class_name(class_folder.name)  # macOS decomposes accents, Linux does not
        spelled.append(class_folder.name)
        images = _images(class_folder, root, notes)
        by_class[name] = tuple(Record(_relative(path, base), LocalFile(path), name) for path in images)
    note_look_alikes(spelled, folder, "class folders", notes)
    return by_class


def _relative(path: Path, base: Path) -> str:
    """Return `path` as seen from `base`, with forward slashes; ``../…`` for a validation folder given separately."""
    inside, text = f"{base}{os.sep}", str(path)
    return (text[len(inside) :] if text.startswith(inside) else os.path.relpath(text, base)).replace(os.sep, "/")


def _images(class_folder: Path, root: Path, notes: Notes) -> list[Path]:
    images = []
    for path in _walk(class_folder, notes):
        suffix = path.suffix.lower()
        if not _is_image_name(path):
            notes.not_images.append(str(path))
        elif path.is_symlink() and not path.resolve().is_relative_to(root):
            notes.bad.append(BadImage(str(path), f"a link that leads out of {printable(root)}; copy the file there"))
        elif suffix in FOREIGN_IMAGE_SUFFIXES:
            notes.bad.append(BadImage(str(path), f"{suffix[1:].upper()} files are not read; convert it to JPEG or PNG"))
        elif not path.is_file():
            notes.bad.append(BadImage(str(path), "not a regular file"))
        else:
            images.append(path)
    return images


def _is_image_name(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES or path.suffix.lower() in FOREIGN_IMAGE_SUFFIXES


def _listing(folder: Path, notes: Notes) -> tuple[list[Path], list[Path]]:
    """Return files and folders of a folder by name, without hidden files and what operating systems leave behind.

    A link to a folder counts as neither: following it could leave the dataset or never end.
    """
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(".") or entry.name.casefold() in JUNK:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif entry.is_dir():
                    notes.problem(Path(entry.path), "a link to a folder, which is not followed; put the folder itself there")
                else:
                    files.append(Path(entry.path))
    except OSError as error:
        notes.problem(folder, f"cannot be listed: {error.strerror}")
    return files, folders


def _walk(folder: Path, notes: Notes) -> Iterator[Path]:
    """Yield every file under `folder`, nested folders included, in a fixed order."""
    files, folders = _listing(folder, notes)
    yield from files
    for nested in folders:
        yield from _walk(nested, notes)
