"""Find out which folders are the root, the splits and the classes, for every kind of place.

Wrapping folders and splits under other names such as ``training_set`` are recognised, and the interpretation is reported. If
folder names look like splits and the interpretation is not certain, a problem asks the user: a split that is taken for a class
would produce a useless model without a warning.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from finetune.data.dataset import SPLITS, BadImage, Split
from finetune.data.names import class_name, in_encoding, possible_readings, problem_of_class_name
from finetune.data.notes import Notes
from finetune.data.places.tree import Folder, Node, Tree, shown_path
from finetune.data.reading import Reading
from finetune.data.splits_by_name import Meaning, split_meaning
from finetune.messages import natural_list, plural, printable

_UNLABELLED = "no_label"
ByClass = dict[str, list[Node]]


@dataclass
class Layout:
    """Image files by split and class; a class may have none. `root` is the folder that paths are counted from."""

    root: Folder
    splits: dict[Split | None, ByClass] = field(default_factory=dict)
    places: dict[Split | None, str] = field(default_factory=dict)


def find_layout(tree: Tree, reading: Reading, notes: Notes) -> Layout:
    """Find splits and classes in a tree of folders."""
    return _Reader(tree, reading, notes).read()


def without_wrapping(folder: Folder, reading: Reading) -> Folder:
    """Return the innermost of folders that hold nothing but one folder with all the images."""
    while (inner := _only_folder(folder)) is not None:
        meaning = split_meaning(inner.name, reading.splits)
        if meaning is not None and meaning.certain:
            break
        folder = inner
    return folder


def _only_folder(folder: Folder) -> Folder | None:
    """Return the only folder with images if it contains folders with images and no images itself; else None."""
    if any(node.is_image for node in folder.files):
        return None
    full = [inner for inner in folder.folders if inner.has_images()]
    if len(full) != 1 or any(node.is_image for node in full[0].files):
        return None
    # Empty folders beside it may be classes without images, so a single folder inside is not sufficient evidence.
    is_sure = len(folder.folders) == 1 or sum(inner.has_images() for inner in full[0].folders) > 1
    return full[0] if is_sure else None


@dataclass
class _Reader:
    tree: Tree
    reading: Reading
    notes: Notes

    def read(self) -> Layout:
        whole = self.tree.root()
        root = without_wrapping(whole, self.reading)
        if root is not whole:
            self.notes.say(f"the folder around everything, {printable(root.path)}/, was left out")
        self._say_left_out(whole)
        root = self._without_left_out(root)
        layout = Layout(root)
        found = self._splits_in(root)
        if found is None:
            return layout  # its problem is noted
        if not found:
            found = {None: [root]} if not (inside := self._splits_in_classes(root)) else {}
            layout.splits.update(inside)
            layout.places.update(dict.fromkeys(inside, self._shown(root)))
        for split, folders in found.items():
            merged: ByClass = defaultdict(list)
            for folder in folders:
                for name, nodes in self._classes_of(folder, within=split).items():
                    merged[name] += nodes
            layout.splits[split] = dict(merged)
            layout.places[split] = self._shown(folders[0])
        return layout

    def _shown(self, folder: Folder) -> str:
        return shown_path(self.tree, folder.path)

    def _say_left_out(self, whole: Folder) -> None:
        names = sorted(printable(path) for folder in whole.walk() for path in folder.left_out)
        if names:
            self.notes.say(f"left out, as systems or programs create them: {natural_list(names, 8)}")

    # ---------------------------------------------------------------------------------------------------------------- splits

    def _splits_in(self, root: Folder) -> dict[Split | None, list[Folder]] | None:
        """Return the folders in `root` by split; empty if its folders are classes; None if a problem was noted."""
        meanings = {folder.name: split_meaning(folder.name, self.reading.splits) for folder in root.folders}
        folders = root.folders
        named = [folder for folder in folders if (meaning := meanings[folder.name]) and meaning.split]
        others = [folder for folder in folders if folder not in named]
        if not named:
            return {}
        deep = [folder for folder in named if self._class_names(folder)]
        in_data_splits = [folder for folder in named if self._is_in_data_splits(folder)]
        full_others = [folder for folder in others if folder.has_images()]
        if not deep and not in_data_splits:
            return self._flat(root, named, full_others)
        unsure = [folder for folder in named if not self._certain(meanings[folder.name])]
        if unsure and not self._same_classes(deep):
            self._note_ambiguity(root, named, "their names look like splits, but their contents do not confirm it")
            return None
        if full_others and not any(self._meant(folder) == "train" for folder in deep):
            if in_data_splits:  # a test folder beside the classes, and data.splits says that it is one
                return {**self._by_split(root, named), None: [_with_only(root, others)]}
            self._note_ambiguity(root, named, f"beside {_slashed(full_others[:5])} they may be splits or classes")
            return None
        if unsure:
            self.notes.say(f"{_slashed(named)} were taken for splits: their names say so, and the same class folders lie in them")
        return self._checked(root, named, deep, others)

    def _without_left_out(self, folder: Folder) -> Folder:
        """Return a folder without the subfolders that the user or the convention of a tool leaves out."""
        kept = [inner for inner in folder.folders if not self._is_left_out(inner)]
        return folder if len(kept) == len(folder.folders) else _with_only(folder, kept)

    def _is_left_out(self, folder: Folder) -> bool:
        meaning = split_meaning(folder.name, self.reading.splits)
        if folder.name == _UNLABELLED and meaning is None:  # CVAT's name for images without labels
            self.notes.say(
                f"{printable(folder.path)}/ was left out; --set 'data.splits={{{folder.name}: class}}' makes it a class"
            )
            return True
        if meaning is None or meaning.meaning != "none":
            return False
        self.notes.say(f"{printable(folder.path)}/ was left out, as data.splits says")
        return True

    def _is_in_data_splits(self, folder: Folder) -> bool:
        return folder.name.casefold() in {name.casefold() for name in self.reading.splits}

    def _certain(self, meaning: Meaning | None) -> bool:
        return meaning is not None and meaning.certain

    def _meant(self, folder: Folder) -> Split | None:
        meaning = split_meaning(folder.name, self.reading.splits)
        return None if meaning is None else meaning.split

    def _flat(self, root: Folder, named: Sequence[Folder], others: Sequence[Folder]) -> dict[Split | None, list[Folder]] | None:
        """Decide whether folders that are named like splits but contain images directly are splits or classes."""
        full = [folder for folder in named if folder.has_images()]
        if not full:  # empty folders of that name
            return {} if others else self._checked(root, named, [], others)
        certain = {self._meant(folder) for folder in full if self._certain(split_meaning(folder.name, self.reading.splits))}
        if others and len(certain) < 2:
            return {}  # classes of that name, such as "train" beside "plane" and "car"
        self._note_ambiguity(root, full, "they hold images directly, and no class folders: are they classes?")
        return None

    def _note_ambiguity(self, root: Folder, named: Sequence[Folder], why: str) -> None:
        meant = {folder.name: self._meant(folder) for folder in named}
        others = [folder.name for folder in root.folders if folder.has_images() and folder not in named]
        if len(others) == 1 and "train" not in meant.values():
            meant = {others[0]: "train", **meant}
        self.notes.problem(
            self._shown(root),
            f"{_slashed(named)}: {why}. Say what they are with data.splits, for example "
            f"{_splits_flag(meant)} (train, val, test, class, or none to leave a folder out)",
        )

    def _same_classes(self, folders: Sequence[Folder]) -> bool:
        """Return whether folders that may be splits contain class folders with mostly the same names."""
        if len(folders) < 2 or len({self._meant(folder) for folder in folders}) < 2:
            return False
        names = [self._class_names(folder) for folder in folders]
        fewest = min(len(one) for one in names)
        return len(frozenset.intersection(*names)) * 2 >= fewest

    def _class_names(self, folder: Folder) -> frozenset[str]:
        inner = self._inside_split(folder)
        return frozenset(class_name(one.name) for one in inner.folders if one.has_images())

    def _inside_split(self, folder: Folder) -> Folder:
        """Return the folder that contains the class folders of a split, below any wrapping folders."""
        split = self._meant(folder)
        while (inner := _only_folder(folder)) is not None and self._meant(inner) in (None, split):
            folder = inner
        return folder

    def _by_split(self, root: Folder, named: Sequence[Folder]) -> dict[Split | None, list[Folder]]:
        by_split: dict[Split | None, list[Folder]] = {}
        for split in SPLITS:
            if of_split := [folder for folder in named if self._meant(folder) == split]:
                by_split[split] = of_split
                if len(of_split) > 1 and not all(map(self._is_in_data_splits, of_split)):
                    self.notes.problem(
                        self._shown(root),
                        f"{_slashed(of_split)} both mean {split}; keep one of them, or say what each is with data.splits",
                    )
        return by_split

    def _checked(
        self, root: Folder, named: Sequence[Folder], deep: Sequence[Folder], others: Sequence[Folder]
    ) -> dict[Split | None, list[Folder]]:
        """Return the split folders; note all files and folders beside them that belong to no split."""
        unlabelled = [
            folder for folder in named if folder not in deep and folder.has_images() and self._meant(folder) == "test" and deep
        ]
        for folder in unlabelled:
            n_images = sum(node.is_image for node in folder.all_files())
            self.notes.left_out.append(
                f"{self._shown(folder)}: {plural(n_images, 'image')} without class folders, so without labels, left out"
            )
        self._note_loose(root)
        for folder in others:
            self._note_stray(folder)
        by_split = self._by_split(root, [folder for folder in named if folder not in unlabelled])
        shown = natural_list(f"{printable(folders[0].path)}/ is {split}" for split, folders in by_split.items())
        if any(folders[0].name.casefold() != split for split, folders in by_split.items()):
            self.notes.say(f"splits: {shown}")
        return by_split

    def _splits_in_classes(self, root: Folder) -> dict[Split | None, ByClass]:
        """Return the layout of class folders that each contain splits (cat/train, cat/val, dog/train …); None if they do not."""
        full = [folder for folder in root.folders if folder.has_images()]
        found: dict[Split | None, ByClass] = {}
        if len(full) < 2 or any(node.is_image for folder in full for node in folder.files):
            return {}
        for folder in full:
            for inner in folder.folders:
                meaning = split_meaning(inner.name, self.reading.splits)
                if meaning is None or meaning.split is None or not meaning.certain:
                    if inner.has_images():
                        return {}
                    continue
                name = self._checked_name(folder)
                if name is not None:
                    found.setdefault(meaning.split, {}).setdefault(name, []).extend(self._images(inner))
        if found:
            self.notes.say(f"each class folder holds splits ({natural_list(str(split) for split in found)})")
        return found

    # --------------------------------------------------------------------------------------------------------------- classes

    def _classes_of(self, folder: Folder, within: Split | None) -> ByClass:
        """Return the images of each class in one folder of class folders."""
        root = self._without_left_out(self._inside_split(folder)) if within is not None else folder
        if root.path != folder.path:
            self.notes.say(f"the folder around the classes of {within}, {printable(root.path)}/, was left out")
        self._note_loose(root)
        for path, why in root.unusual:
            note = self.notes.problem if "leads out" in why or "listed" in why else self._note_left_out
            note(shown_path(self.tree, path), why)
        full = [inner for inner in root.folders if inner.has_images()]
        which = self.reading.class_folder
        if which == "auto":
            if (repeated := _repeated_inside(full)) is not None:
                self._note_ambiguous_level(root, full, repeated)
                return {}
            self._say_nested(full)
        return self._innermost(root) if which == "last" else self._outermost(root)

    def _outermost(self, root: Folder) -> ByClass:
        found: ByClass = {}
        spelled: dict[str, list[str]] = defaultdict(list)
        for folder in root.folders:
            name = self._checked_name(folder)
            if name is not None:
                spelled[name].append(folder.name)
                found[name] = found.get(name, []) + self._images(folder)
        for names in spelled.values():
            if len(names) > 1:
                same = " and ".join(map(repr, names))
                self.notes.problem(
                    self._shown(root),
                    f"class folders {same} differ only in how accents are encoded; merge or rename them",
                )
        return found

    def _innermost(self, root: Folder) -> ByClass:
        found: ByClass = {}
        for folder in (inner for top in root.folders for inner in top.walk()):
            images = self._images_directly_in(folder)
            name = self._checked_name(folder) if images else None
            if name is not None:
                found[name] = found.get(name, []) + images
        return found

    def _checked_name(self, folder: Folder) -> str | None:
        """Return the class name of a folder; note a problem if the folder's name cannot be a class name."""
        name = class_name(in_encoding(folder.name, self.reading.name_encoding))
        why = problem_of_class_name(name)
        if why is None:
            return name
        self.notes.problem(self._shown(folder), f"a class name that {why}; rename the folder{_hint_for_bytes(folder.name)}")
        return None

    def _note_ambiguous_level(self, root: Folder, full: Sequence[Folder], repeated: Sequence[str]) -> None:
        tops = [printable(folder.name) for folder in full]
        meant = dict(zip((folder.name for folder in full), SPLITS, strict=False))
        self.notes.problem(
            self._shown(root),
            f"the same folders ({natural_list(map(printable, repeated))}) lie in each of {natural_list(tops)}, so either may be "
            f"the classes. --set data.class_folder=last takes {natural_list(map(printable, repeated))}; "
            f"--set data.class_folder=first takes {natural_list(tops)}. If those are splits, say what each is, for example "
            f"{_splits_flag(meant)} (train, val, test, or none to leave a folder out)",
        )

    def _say_nested(self, full: Iterable[Folder]) -> None:
        nested = [inner for folder in full for inner in folder.folders if inner.has_images()]
        if nested:
            examples = natural_list((printable(one.path) for one in nested), 3)
            self.notes.say(
                f"folders inside class folders belong to their class ({examples}); "
                "--set data.class_folder=last makes the innermost folder the class"
            )

    def _images(self, folder: Folder) -> list[Node]:
        return [node for inner in folder.walk() for node in self._images_directly_in(inner)]

    def _images_directly_in(self, folder: Folder) -> list[Node]:
        images = []
        for path, why in folder.unusual:
            self.notes.bad.append(BadImage(shown_path(self.tree, path), why))
        for node in folder.files:
            if not node.is_image:
                self.notes.not_images.append(shown_path(self.tree, node.path))
            elif node.is_foreign:
                reason = f"{node.suffix[1:].upper()} files are not read; convert it to JPEG or PNG"
                self.notes.bad.append(BadImage(shown_path(self.tree, node.path), reason))
            else:
                images.append(node)
        return images

    def _note_left_out(self, where: str, why: str) -> None:
        self.notes.left_out.append(f"{where}: {why}, left out")

    def _note_loose(self, folder: Folder) -> None:
        loose = [printable(node.name) for node in folder.files if node.is_image]
        if loose:
            self.notes.problem(
                self._shown(folder),
                f"{plural(len(loose), 'image')} in no class folder, so without a label: {natural_list(loose)}",
            )

    def _note_stray(self, folder: Folder) -> None:
        n_images = sum(node.is_image for node in folder.all_files())
        if n_images:
            self.notes.problem(
                self._shown(folder),
                f"{plural(n_images, 'image')} in a folder beside train/ that is not named train, val or test; "
                f"--set 'data.splits={{{printable(folder.name)}: none}}' leaves it out, and val or test in place of none uses it",
            )
        else:
            self.notes.left_out.append(f"{self._shown(folder)}: a folder without images beside train/, left out")


def _repeated_inside(full: Sequence[Folder]) -> list[str] | None:
    """Return the names of the folders that all of several candidate class folders contain, if these have no images themselves."""
    if len(full) < 2 or any(node.is_image for folder in full for node in folder.files):
        return None
    inside = [{inner.name for inner in folder.folders if inner.has_images()} for folder in full]
    shared = set.intersection(*inside)
    if len(shared) < 2 or 2 * len(shared) < max(len(names) for names in inside):
        return None
    return sorted(shared)


def _with_only(root: Folder, folders: Sequence[Folder]) -> Folder:
    return Folder(root.name, root.path, root.files, list(folders), root.unusual)


def _slashed(folders: Iterable[Folder]) -> str:
    return " and ".join(f"{printable(folder.name)}/" for folder in folders)


def _splits_flag(meant: Mapping[str, Split | None]) -> str:
    """Return the flag that gives folders their splits, with names in quotes where YAML needs them."""
    names = {
        name: printable(name) if re.fullmatch(r"\w[\w.-]*", name) else json.dumps(printable(name), ensure_ascii=False)
        for name in meant
    }
    return f"--set {shlex.quote('data.splits={' + ', '.join(f'{names[name]}: {split}' for name, split in meant.items()) + '}')}"


def _hint_for_bytes(name: str) -> str:
    if not any("\ud800" <= letter <= "\udfff" for letter in name):
        return ""
    readings = possible_readings(name.encode("utf-8", "surrogateescape"))
    return f", or set data.name_encoding: it reads {readings}" if readings else ""
