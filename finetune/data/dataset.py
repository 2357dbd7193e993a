"""The dataset type: samples, classes, and files that were left out. All sources return it. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from finetune.bundle.image import naming
from finetune.data.files import ImageFile, LocalFile, MemberFile, StoredFile
from finetune.errors import ImageError
from finetune.messages import natural_list, plural
from finetune.tasks import Target

T = TypeVar("T")
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image.

    `sha256` (of the file's bytes) and `size_px` (width, height, upright) are filled in by `check_images`.
    """

    id: str  # names the sample within its dataset: a path relative to the root, with forward slashes, or a row of a table
    file: ImageFile
    target: Target
    split: str | None = None  # train, val or test; None until the dataset is split
    group: str | None = None  # samples of one group, such as photographs of one object, are on one side of every split
    weight: float = 1.0  # how much it counts in training
    sha256: str = ""
    size_px: tuple[int, int] | None = None

    def decode(self, decode: Callable[[bytes], T]) -> T:
        """Return the result of `decode` for the image file's bytes; an `ImageError` names the file."""
        try:
            return decode(self.file.read())
        except ImageError as error:
            raise naming(str(self.file), error) from None

    def read(self) -> bytes:
        """Return the bytes of the image file; an `ImageError` names the file."""
        return self.decode(lambda data: data)

    def with_sha256(self, sha256: str) -> Sample:
        """Return the sample with the digest of its bytes."""
        return replace(self, sha256=sha256)

    @property
    def labels(self) -> tuple[int, ...]:
        """The target as class indices, one or several."""
        return (self.target,) if isinstance(self.target, int) else self.target

    def renumbered(self, numbers: Sequence[int]) -> Sample:
        """Return the sample with the class index `numbers[label]` in place of each of its labels."""
        if isinstance(self.target, int):
            return replace(self, target=numbers[self.target])
        return replace(self, target=tuple(sorted(numbers[label] for label in self.target)))


NO_SUCH_FILE = "no such file"
NAMES_NO_FILE = "names no image file"


def is_missing(reason: str) -> bool:
    """Return whether the reason for leaving a file out is that it does not exist."""
    return reason.startswith((NO_SUCH_FILE, NAMES_NO_FILE))


def left_out_files(reasons: Iterable[str]) -> str:
    """Return how many files are missing and how many cannot be read, given the reason for each; empty if none are."""
    missing = [is_missing(reason) for reason in reasons]
    n_missing, n_unreadable = missing.count(True), missing.count(False)
    parts = [(n_missing, "missing file"), (n_unreadable, "unreadable file")]
    return " and ".join(plural(count, what) for count, what in parts if count)


@dataclass(frozen=True)
class BadImage:
    """A file that looks like an image and is left out, with the reason."""

    where: str
    reason: str

    @property
    def is_missing(self) -> bool:
        """Whether a table or export names no file, or one that does not exist."""
        return is_missing(self.reason)


@dataclass(frozen=True)
class Dataset:
    """Samples in a fixed order (split, class, id), the ordered class names, files that were left out, and warnings."""

    name: str
    root: str  # the folder, file or address that was given
    classes: tuple[str, ...]
    samples: tuple[Sample, ...] = field(repr=False)
    bad: tuple[BadImage, ...] = ()
    warnings: tuple[str, ...] = ()
    understood: tuple[str, ...] = ()  # sentences: how the data was interpreted, if several interpretations were possible
    revision: str = ""  # the digest of the checked data before it was split

    def of(self, split: str) -> tuple[Sample, ...]:
        """Return the samples of one split, in their order."""
        return tuple(sample for sample in self.samples if sample.split == split)

    def counts(self) -> dict[str, dict[str, int]]:
        """Count images by split and class, zeros included; the key is ``all`` for images that are in no split yet."""
        found = Counter((sample.split or "all", label) for sample in self.samples for label in sample.labels)
        present = {sample.split or "all" for sample in self.samples}
        splits = [split for split in (*SPLITS, "all") if split in present]
        return {split: {name: found[split, label] for label, name in enumerate(self.classes)} for split in splits}

    def class_sizes(self) -> tuple[int, ...]:
        """Count the images of each class in all splits together, in the order of the classes."""
        found = Counter(label for sample in self.samples for label in sample.labels)
        return tuple(found[label] for label in range(len(self.classes)))

    def sizes(self) -> dict[str, int]:
        """Count images by split; the key is ``all`` for images that are in no split yet."""
        found = Counter(sample.split or "all" for sample in self.samples)
        return {split: found[split] for split in (*SPLITS, "all") if found[split]}

    def label_names(self, sample: Sample) -> tuple[str, ...]:
        """Return the names of a sample's classes."""
        return tuple(self.classes[label] for label in sample.labels)

    def label_text(self, sample: Sample) -> str:
        """Return a sample's label as one text: the class name, or a JSON list of names where several are possible."""
        names = self.label_names(sample)
        return names[0] if isinstance(sample.target, int) else json.dumps(names, ensure_ascii=False)

    @property
    def digest(self) -> str:
        """The sha256 of classes, labels, splits and contents, and of groups and weights if there are any.

        The location of the data and the names and order of files have no influence. Before `check_images` has read the files,
        their ids are used instead of their contents.
        """
        rows = sorted(
            (self.label_text(sample), sample.split or "", sample.sha256 or sample.id, *_group_and_weight(sample))
            for sample in self.samples
        )
        canonical = json.dumps([self.classes, rows], separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _group_and_weight(sample: Sample) -> tuple[str, ...]:
    return () if sample.group is None and sample.weight == 1.0 else (sample.group or "", repr(sample.weight))


def unmeasured(split: str, classes: Sequence[str], noun: str = "class") -> str:
    """Return the warning that a split has no image of these classes, or labels."""
    return f"{split}: no images of {plural(len(classes), noun)}, which it cannot measure: {natural_list(classes)}"


__all__ = [
    "SPLITS", "BadImage", "Dataset", "ImageFile", "LocalFile", "MemberFile", "Sample", "Split", "StoredFile", "targets_of",
]  # fmt: skip


def targets_of(samples: Sequence[Sample]) -> list[Target]:
    """Return the targets of samples, in their order."""
    return [sample.target for sample in samples]
