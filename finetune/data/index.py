"""A folder of labelled photographs → samples, classes and everything that is wrong with the folder, all at once.

Two layouts are read: one folder per class, or ``train`` / ``val`` (``valid``, ``validation``) / ``test`` folders with class
folders inside. Labels come from folder names alone and are aligned over the splits by name, never by position. This module
opens no file: whether an image decodes, and which bytes occur twice, is the business of `finetune.data.check`. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.errors import DataError, Problem, did_you_mean

SPLITS = ("train", "val", "test")
SPLIT_FOLDERS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip

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

SHOWN = 5  # how many names a sentence spells out before it says "and N more"


@dataclass(frozen=True)
class Sample:
    """One labelled image. `split` is train, val, test, or None until the dataset is split.

    `sha256` (of the file's bytes) and `size_px` (width, height, upright) are filled in by `check_images`.
    """

    path: Path
    label: int
    split: str | None
    sha256: str = ""
    size_px: tuple[int, int] | None = None


@dataclass(frozen=True)
class BadImage:
    """A file that looks like an image and is left out because it cannot be read."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Dataset:
    """Samples in a fixed order (split, class, path), the ordered class names, and what was left out or looks odd."""

    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...] = field(repr=False)
    bad: tuple[BadImage, ...] = ()
    warnings: tuple[str, ...] = ()

    def of(self, split: str) -> tuple[Sample, ...]:
        return tuple(sample for sample in self.samples if sample.split == split)

    def counts(self) -> dict[str, dict[str, int]]:
        """Images by split and class, zeros included; the key is ``all`` for images that are in no split yet."""
        found = Counter((sample.split or "all", sample.label) for sample in self.samples)
        splits = [split for split in (*SPLITS, "all") if any(key[0] == split for key in found)]
        return {split: {name: found[split, label] for label, name in enumerate(self.classes)} for split in splits}

    def relative(self, path: Path) -> str:
        """`path` as seen from the dataset's root, with forward slashes; ``../…`` for a validation folder given separately."""
        inside = f"{self.root}{os.sep}"
        text = str(path)
        return (text[len(inside) :] if text.startswith(inside) else os.path.relpath(text, self.root)).replace(os.sep, "/")

    @property
    def digest(self) -> str:
        """sha256 over classes, labels, splits and contents; where the folder lies and the order of files do not matter.

        Before `check_images` has read the files, their relative paths stand in for their contents.
        """
        rows = sorted(
            (self.classes[sample.label], sample.split or "", sample.sha256 or self.relative(sample.path))
            for sample in self.samples
        )
        canonical = json.dumps([self.classes, rows], separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def index_dataset(training: Path, validation: Path | None = None, test: Path | None = None) -> Dataset:
    """Find the classes and images under `training`, and under separate `validation` and `test` folders when given.

    Samples of a plain folder of class folders have no split yet, unless a validation folder is given beside it.

    Raises:
        DataError: with one `Problem` for everything that keeps the folders from being trained on.
    """
    notes = _Notes()
    root = training.resolve()
    folders = _locate_splits(training, validation, test, notes)
    found = {
        split: _scan_split(folder, root if folder.is_relative_to(root) else folder, notes) for split, folder in folders.items()
    }
    classes = tuple(sorted(found.get("train") or found.get(None) or {}))
    _check_classes(found, folders, notes)
    if notes.problems:
        raise DataError(_refusal(training, notes.problems), notes.problems)
    label_of = {name: label for label, name in enumerate(classes)}
    samples = [
        Sample(path, label_of[name], split)
        for split, by_class in found.items()
        for name, paths in sorted(by_class.items())
        for path in paths
        if name in label_of
    ]
    return Dataset(root, classes, tuple(samples), tuple(notes.bad), tuple(notes.warnings()))


def natural_list(names: Iterable[object], limit: int = SHOWN) -> str:
    """``a, b, c and 4 more``."""
    shown = [str(name) for name in names]
    more = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {more} more" if more > 0 else "")


def plural(count: int, noun: str) -> str:
    """``1 image``, ``3 images``, ``2 classes``."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}" + ("" if count == 1 else ending)


def printable(path: Path | str) -> str:
    """A file name that is safe to print and log: undecodable bytes and control characters are written as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


# ---------------------------------------------------------------------------------------------------------------- internals

_ByClass = dict[str, list[Path]]


@dataclass
class _Notes:
    """Everything worth telling that turns up on the way."""

    problems: list[Problem] = field(default_factory=list)
    bad: list[BadImage] = field(default_factory=list)
    not_images: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def problem(self, where: Path, message: str) -> None:
        """Note it once: a folder may be listed more than once on the way."""
        problem = Problem(printable(where), message)
        if problem not in self.problems:
            self.problems.append(problem)

    def warnings(self) -> list[str]:
        if not self.not_images:
            return self.left_out
        names = natural_list(printable(path) for path in self.not_images)
        return [f"{plural(len(self.not_images), 'file')} not named like an image, left out: {names}", *self.left_out]


def _refusal(training: Path, problems: Sequence[Problem]) -> str:
    name = printable(training)
    return (
        f"{name}: cannot be trained on, {plural(len(problems), 'problem')}. Expected one folder per class, "
        f"for example {name}/daisy/1.jpg and {name}/rose/2.jpg; or splits with class folders inside, "
        f"for example {name}/train/daisy/1.jpg and {name}/val/daisy/2.jpg."
    )


def _locate_splits(training: Path, validation: Path | None, test: Path | None, notes: _Notes) -> dict[str | None, Path]:
    """Which folder holds the class folders of which split; the key None is a folder that is still to be split."""
    given = {"train": training, "val": validation, "test": test}
    present = {split: path.resolve() for split, path in given.items() if path is not None and _is_folder(path, notes)}
    if "train" not in present:
        return {}
    inside = _splits_inside(present["train"], notes)
    for split in ("val", "test"):
        if split in inside and split in present:
            both = f"{inside[split].name}/ inside and {printable(present[split])} given separately"
            notes.problem(training, f"two {split} folders: {both}; give one of them")
    separate: dict[str | None, Path] = {split: path for split, path in present.items() if split != "train"}
    if inside:
        return {**inside, **separate}
    # A test set of one's own does not spare the cut of a validation set: then the training folder is still to be split.
    return {"train" if "val" in separate else None: present["train"], **separate}


def _is_folder(path: Path, notes: _Notes) -> bool:
    if path.is_dir():
        return True
    if path.exists():
        notes.problem(path, "is a file, not a folder of images; unpack an archive first")
    else:
        notes.problem(path, "no such folder")
    return False


def _splits_inside(training: Path, notes: _Notes) -> dict[str | None, Path]:
    """The train, val and test folders of the second layout; empty for the first.

    A class may be called "train" (beside "plane" and "car"): a folder of that name is taken for a split only when it has
    folders of its own, or when every folder beside it is named like a split too.
    """
    files, folders = _listing(training, notes)
    named: dict[str, list[Path]] = defaultdict(list)
    for path in folders:
        if split := SPLIT_FOLDERS.get(path.name.casefold()):
            named[split].append(path)
    others = [path for path in folders if path.name.casefold() not in SPLIT_FOLDERS]
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


def _note_loose_images(folder: Path, files: Iterable[Path], notes: _Notes) -> None:
    loose = [printable(path.name) for path in files if _is_image_name(path)]
    if loose:
        notes.problem(folder, f"{plural(len(loose), 'image')} in no class folder, so without a label: {natural_list(loose)}")


def _note_stray_folder(folder: Path, notes: _Notes) -> None:
    n_images = sum(_is_image_name(path) for path in _walk(folder, notes))
    if n_images:
        notes.problem(folder, f"{plural(n_images, 'image')} in a folder beside train/ that is not named train, val or test")
    else:
        notes.left_out.append(f"{printable(folder)}: a folder without images beside train/, left out")


def _scan_split(folder: Path, root: Path, notes: _Notes) -> _ByClass:
    """Image files by class name of one folder of class folders; links may lead anywhere inside `root`."""
    files, class_folders = _listing(folder, notes)
    _note_loose_images(folder, files, notes)
    by_class: _ByClass = {}
    spelled: dict[str, list[str]] = defaultdict(list)
    for class_folder in class_folders:
        name = unicodedata.normalize("NFC", class_folder.name).strip()  # macOS decomposes accents, Linux does not
        if printable(class_folder.name) != class_folder.name:
            notes.problem(class_folder, "a class name with undecodable bytes or control characters; rename the folder")
            continue
        spelled[name.casefold()].append(class_folder.name)
        by_class[name] = _images(class_folder, root, notes)
    for names in spelled.values():
        if len(names) > 1:
            same = " and ".join(repr(name) for name in names)
            notes.problem(folder, f"class folders {same} differ only in case, spaces or accent encoding; merge or rename them")
    return by_class


def _images(class_folder: Path, root: Path, notes: _Notes) -> list[Path]:
    images = []
    for path in _walk(class_folder, notes):
        suffix = path.suffix.lower()
        if not _is_image_name(path):
            notes.not_images.append(path)
        elif path.is_symlink() and not path.resolve().is_relative_to(root):
            notes.bad.append(BadImage(path, f"a link that leads out of {printable(root)}; copy the file there"))
        elif suffix in FOREIGN_IMAGE_SUFFIXES:
            notes.bad.append(BadImage(path, f"{suffix[1:].upper()} files are not read; convert it to JPEG or PNG"))
        elif not path.is_file():
            notes.bad.append(BadImage(path, "not a regular file"))
        else:
            images.append(path)
    return images


def _is_image_name(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES or path.suffix.lower() in FOREIGN_IMAGE_SUFFIXES


def _listing(folder: Path, notes: _Notes) -> tuple[list[Path], list[Path]]:
    """(files, folders) of a folder by name, without hidden files and what operating systems leave behind.

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


def _walk(folder: Path, notes: _Notes) -> Iterator[Path]:
    """Every file under `folder`, nested folders included, in a fixed order."""
    files, folders = _listing(folder, notes)
    yield from files
    for nested in folders:
        yield from _walk(nested, notes)


def _check_classes(found: Mapping[str | None, _ByClass], folders: Mapping[str | None, Path], notes: _Notes) -> None:
    """Problems and warnings about the classes of each split and their counts."""
    key = "train" if "train" in found else None
    if key not in found:
        return
    train, folder = found[key], folders[key]
    _check_number_of_classes(train, folder, notes)
    for name, paths in train.items():
        if not paths:
            notes.problem(
                folder / name, f"class {name!r} has no images{_unusable(folder / name, notes)}. Add some, or remove the folder"
            )
        elif len(paths) == 1 and "val" not in found:
            notes.problem(
                folder / name, f"class {name!r} has 1 image; it takes at least 2, one to train on and one to validate on"
            )
    for split in ("val", "test"):
        if split in found:
            _compare_classes(split, found[split], train, folders[split], notes)


def _unusable(folder: Path, notes: _Notes) -> str:
    """What is in a folder instead of images, in brackets."""
    bad = [image for image in notes.bad if image.path.is_relative_to(folder)]
    if not bad:
        return ""
    others = f"; and {len(bad) - 1:,} more" if len(bad) > 1 else ""
    return f" ({printable(bad[0].path.name)}: {bad[0].reason}{others})"


def _check_number_of_classes(train: _ByClass, folder: Path, notes: _Notes) -> None:
    if not train:
        notes.problem(folder, "no class folders found")
    if len(train) != 1:
        return
    ((name, paths),) = train.items()
    nested = sorted({path.relative_to(folder / name).parts[0] for path in paths if path.parent != folder / name})
    hint = f" If {natural_list(nested)} are the classes, give {printable(folder / name)} instead" if nested else ""
    notes.problem(folder, f"only one class folder, {name!r} with {plural(len(paths), 'image')}; it takes at least two.{hint}")


def _compare_classes(split: str, by_class: _ByClass, train: _ByClass, folder: Path, notes: _Notes) -> None:
    for name in sorted(set(by_class) - set(train)):
        if by_class[name]:
            n_images, known = plural(len(by_class[name]), "image"), did_you_mean(name, sorted(train))
            notes.problem(folder / name, f"class {name!r} with {n_images} is not among the training classes.{known}")
    missing = [name for name in sorted(train) if not by_class.get(name)]
    if not any(by_class.values()):
        notes.problem(folder, f"the {split} folder has no images in class folders")
    elif missing:
        notes.left_out.append(
            f"{split}: no images of {plural(len(missing), 'class')}, which it cannot measure: {natural_list(missing)}"
        )
