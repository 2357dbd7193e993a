"""What a source of data is: something that lists the samples it holds, and tells everything that is odd about them."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from finetune.data.dataset import BadImage, ImageFile, Split
from finetune.errors import Problem
from finetune.messages import natural_list, plural, printable

SPLIT_NAMES: dict[str, Split] = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""What people call the splits, in lower case."""


@dataclass(frozen=True, slots=True)
class Record:
    """One sample as its source lists it, with its label still a text."""

    id: str
    file: ImageFile
    label: str


@dataclass(frozen=True)
class Listing:
    """The samples of one source by split and class name.

    The split None holds samples that are still to be split; a class may have no samples. Both mappings keep their order.
    """

    splits: Mapping[Split | None, Mapping[str, tuple[Record, ...]]]
    places: Mapping[Split | None, str]  # where each split was found, for messages


@dataclass
class Notes:
    """Everything worth telling that turns up while a source is listed: problems refuse the data, the rest becomes warnings."""

    problems: list[Problem] = field(default_factory=list)
    bad: list[BadImage] = field(default_factory=list)
    not_images: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def problem(self, where: Path | str, message: str) -> None:
        """Note a problem once: a folder may be listed more than once on the way."""
        problem = Problem(printable(where), message)
        if problem not in self.problems:
            self.problems.append(problem)

    def warnings(self) -> tuple[str, ...]:
        """Return what is worth telling and keeps nobody from training."""
        if not self.not_images:
            return tuple(self.left_out)
        names = natural_list(printable(name) for name in self.not_images)
        return (f"{plural(len(self.not_images), 'file')} not named like an image, left out: {names}", *self.left_out)


def class_name(text: str) -> str:
    """Return a label without the differences that nobody sees: accents composed, no space around it."""
    return unicodedata.normalize("NFC", text).strip()


def note_look_alikes(names: Iterable[str], where: Path | str, what: str, notes: Notes) -> None:
    """Note a problem for names that differ only in what `class_name` takes away, or in case."""
    spelled: dict[str, list[str]] = defaultdict(list)
    for name in names:
        spelled[class_name(name).casefold()].append(name)
    for alike in spelled.values():
        if len(alike) > 1:
            same = " and ".join(repr(name) for name in alike)
            notes.problem(where, f"{what} {same} differ only in case, spaces or accent encoding; merge or rename them")


class Source(Protocol):
    """One kind of place that labelled images come from. Every kind is a module of this package and passes one contract suite."""

    name: ClassVar[str]

    def expected(self, location: Path) -> str:
        """Return what data of this kind looks like, with an example, for the error that refuses `location`."""
        ...

    def recognises(self, location: Path) -> bool:
        """Return whether `location` is of this kind; what is wrong inside it is for `read` to tell."""
        ...

    def read(self, location: Path, base: Path, notes: Notes) -> Listing:
        """List the samples under `location`, without opening an image.

        Args:
            base: ids of samples on disk are their paths relative to this folder.
            notes: gets every problem; what cannot be listed is left out of the result.
        """
        ...
