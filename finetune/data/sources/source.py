"""The protocol of a source: one format of labelled images, in any place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from finetune.data.dataset import Split
from finetune.data.files import ImageFile
from finetune.data.notes import Notes
from finetune.data.places.tree import Place
from finetune.data.reading import Reading


@dataclass(frozen=True, slots=True)
class Record:
    """One sample as its source lists it, with its labels as texts."""

    id: str
    file: ImageFile
    labels: tuple[str, ...]
    split: Split | None = None
    group: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Listing:
    """The samples of one source.

    Args:
        records: in a fixed order. A split of None means that the record is still to be split.
        classes: additional classes without samples, such as empty class folders.
        places: the location of each split, for messages.
        several: whether the format allows several labels, or none, for an image.
    """

    records: tuple[Record, ...] = ()
    classes: Mapping[Split | None, tuple[str, ...]] = field(default_factory=dict)
    places: Mapping[Split | None, str] = field(default_factory=dict)
    several: bool = False


def refuse_columns(reading: Reading, notes: Notes, what: str, *, used: Collection[str] = ()) -> None:
    """Note a problem for each column that the user names and the source does not have, so that no option is ignored.

    Args:
        what: the format, in the plural.
        used: fields of `Columns` that the source understands.
    """
    for column, name in vars(reading.columns).items():
        if name is not None and column not in used:
            field_name = column if column == "label_separator" else f"{column}_column"
            notes.problem(f"data.{field_name}", f"{name!r} is given, but {what} have no such column")


class Source(Protocol):
    """One format of labelled images. Every format is a module of this package and passes one contract suite."""

    name: ClassVar[str]

    def expected(self, shown: str) -> str:
        """Return a description of this format with an example, for the error that refuses `shown`."""
        ...

    def recognises(self, place: Place) -> bool:
        """Return whether a place has this format; `read` reports what is wrong inside."""
        ...

    def read(self, place: Place, reading: Reading, notes: Notes) -> Listing:
        """List the samples, without decoding an image.

        Args:
            notes: receives every problem; samples that cannot be listed are left out of the result.
        """
        ...
