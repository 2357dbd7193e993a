"""Open a location that a user gives: a folder, an archive, a file or an address."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from finetune.bundle.image_formats import looks_like_image
from finetune.data.archive import OWN_LIMITS, ArchiveError, kind_of_file
from finetune.data.contents import OBJECTS, is_contents, object_path, read_members, unpack_archive
from finetune.data.files import LocalFile, state_of
from finetune.data.places.local_folder import LocalFolder
from finetune.data.places.packed import PackedTree, open_archive, open_contents
from finetune.data.places.tree import Node, Place
from finetune.data.reading import Reading
from finetune.errors import DataError
from finetune.messages import printable
from finetune.naming import without_archive_ending
from finetune.storage.addresses import is_uri
from finetune.storage.store import mark_used

SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
NO_SPREADSHEETS = "spreadsheets are not read. Save the table as CSV (UTF-8) beside the images"
_WHAT_IS_READ = "Give a folder with one folder of images per class, an archive of one, or a table that names images"


def check_present(*locations: Path | str | None) -> None:
    """Raise `DataError` for a local path that does not exist; addresses are not checked."""
    for location in locations:
        if location is not None and not is_uri(location) and not os.path.exists(location):
            raise DataError(f"{printable(Path(location))}: no such folder or file. {_WHAT_IS_READ}")


def open_place(location: Path | str, reading: Reading) -> Place:
    """Open a folder, an archive, a single file, or a remote folder.

    Raises:
        ArchiveError: an archive is refused; the member is named.
        DataError: the location does not exist, or cannot be read.
    """
    if is_uri(location):
        from finetune.data.places.remote import open_remote

        return open_remote(str(location), reading)
    check_present(location)
    path = Path(location)
    if path.is_dir():
        if is_contents(path):
            return Place(open_contents(path, name_encoding=reading.name_encoding))
        return Place(LocalFolder(path, reading.roots), local=path)
    if not path.is_file():
        raise DataError(f"{printable(path)}: neither a folder nor a regular file. {_WHAT_IS_READ}")
    if looks_like_image(LocalFile(path).head()):
        raise DataError(
            f"{printable(path)}: is a single picture. {_WHAT_IS_READ}. To label a picture with a trained model: "
            f"finetune predict {shlex.quote(printable(path))} --model NAME"
        )
    if path.suffix.lower() in SPREADSHEETS:
        raise DataError(f"{printable(path)}: {NO_SPREADSHEETS}")
    try:
        kind = kind_of_file(path)
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read: {error.strerror}") from None
    if kind is not None:
        return Place(open_packed(path, kind, reading, printable(path)))
    return Place(LocalFolder(path.parent, reading.roots), Node(path.name, path.name, LocalFile(path)), path.parent)


def open_packed(path: Path, kind: str, reading: Reading, shown: str) -> PackedTree:
    """Open an archive on disk; messages call it `shown`.

    Raises:
        ArchiveError: it is refused; the member is named.
    """
    try:
        if kind != "tar.gz":
            return open_archive(path, name_encoding=reading.name_encoding, shown=shown)
        folder = _unpacked(path, reading)
        tree = open_contents(folder, name_encoding=reading.name_encoding, shown=shown)
        tree.name = without_archive_ending(Path(shown).name)
        return tree
    except ArchiveError as error:
        raise ArchiveError(f"{shown}: {error.message}") from None


def _unpacked(path: Path, reading: Reading) -> Path:
    """Return the folder with the contents of an archive that can only be read from its beginning."""
    folder = reading.scratch(f"unpacked {os.path.realpath(path)} {state_of(path)}")
    if folder.exists() and not _is_whole(folder):
        shutil.rmtree(folder)
    if not folder.exists():
        reading.make_room(path.stat().st_size, printable(path))  # photographs hardly shrink when they are packed
        unpack_archive(path, folder, limits=OWN_LIMITS)
    return folder


def _is_whole(folder: Path) -> bool:
    """Return whether an unpacked archive is complete, since files may be evicted from the cache; mark its files as used."""
    try:
        for held in read_members(folder):
            if held.sha256:
                mark_used(object_path(folder, held.sha256))
    except (OSError, DataError):
        return False
    return (folder / OBJECTS).is_dir()
