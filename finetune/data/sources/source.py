"""What a source of data is: one format of labelled images, wherever its files lie, and everything odd about them told."""

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
    """One sample as its source lists it, with its labels still texts."""

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
        records: in a fixed order. Those whose split is None are still to be split.
        classes: names that are there without a sample, such as an empty class folder's.
        places: where each split was found, for messages.
        several: whether an image may have several labels, or none, by what the source says of itself.
    """

    records: tuple[Record, ...] = ()
    classes: Mapping[Split | None, tuple[str, ...]] = field(default_factory=dict)
    places: Mapping[Split | None, str] = field(default_factory=dict)
    several: bool = False


def refuse_columns(reading: Reading, notes: Notes, what: str, *, used: Collection[str] = ()) -> None:
    """Note a problem for each column that is named where the source has none, so that nothing asked for is ignored.

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
        """Return what data of this format looks like, with an example, for the error that refuses `shown`."""
        ...

    def recognises(self, place: Place) -> bool:
        """Return whether a place is of this format; what is wrong inside is for `read` to tell."""
        ...

    def read(self, place: Place, reading: Reading, notes: Notes) -> Listing:
        """List the samples, without decoding an image.

        Args:
            notes: gets every problem; what cannot be listed is left out of the result.
        """
        ...
