"""The options for reading data: columns, meanings of folder names, and the folders that may be accessed."""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from finetune.errors import DataError
from finetune.spec import DataSpec
from finetune.storage.store import Store

ClassFolder = Literal["auto", "first", "last"]
SplitMeaning = Literal["train", "val", "test", "none", "class"]


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table; None: found by their names and contents, and reported."""

    file: str | None = None
    label: str | None = None
    split: str | None = None
    group: str | None = None
    weight: str | None = None
    label_separator: str | None = None  # between several labels in one cell


@dataclass(frozen=True)
class Reading:
    """The options for reading data.

    Args:
        splits: meanings of folder names, or of values of the split column; ``none`` leaves them out, ``class`` marks a class.
            Other names are interpreted automatically.
        class_folder: which folder of a path is the class if folders are nested.
        name_encoding: encoding of names in archives that do not state it.
        roots: folders that links and tables may point into; None: any folder that the user may read.
        store: cache for unpacked archives; None: a temporary folder of this process.
    """

    columns: Columns = Columns()
    splits: Mapping[str, SplitMeaning] = field(default_factory=dict)
    class_folder: ClassFolder = "auto"
    name_encoding: str = "auto"
    roots: tuple[Path, ...] | None = None
    store: Store | None = field(default=None, compare=False)

    def scratch(self, key: str) -> Path:
        """Return a folder for files derived from the contents that `key` identifies; it may not exist yet."""
        folder = self.store.folder("sources") if self.store is not None else _of_this_process()
        return folder / hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def make_room(self, n_bytes: int, what: str) -> None:
        """Reserve room in the store.

        Raises:
            DataError: this exceeds the size limit of the store.
        """
        if self.store is not None and not self.store.reserve(n_bytes):
            raise DataError(
                f"{what}: its contents take {n_bytes / 1e9:,.1f} GB, more than the cache in {self.store.root} may hold. "
                "Unpack it yourself and give the folder"
            )


def reading_of(data: DataSpec, store: Store | None = None) -> Reading:
    """Return the reading options of a request."""
    return Reading(
        columns=Columns(
            file=data.file_column,
            label=data.label_column,
            split=data.split_column,
            group=data.group_column,
            weight=data.weight_column,
            label_separator=data.label_separator,
        ),
        splits=data.splits,
        class_folder=data.class_folder,
        name_encoding=data.name_encoding,
        roots=None if data.within is None else tuple(map(Path, data.within)),
        store=store,
    )


@cache
def _of_this_process() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="finetune-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
