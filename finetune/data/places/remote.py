"""Open a folder, an archive or a table at an address that fsspec supports, such as ``s3://``, ``gs://`` or ``hf://``.

All files are listed at once. Each is fetched when it is first read and kept in the store, so that later epochs and runs read it
from disk. A file whose state at the address (tag, date, size) has changed is fetched again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.bundle.image import read_bytes
from finetune.bundle.image_formats import HEAD_BYTES
from finetune.bundle.image_limits import DEFAULT_LIMITS, ImageLimits, check_bytes
from finetune.data.archive import archive_kind
from finetune.data.files import SourceFile
from finetune.data.places.tree import Folder, Node, Place, build_folder, find_in
from finetune.data.reading import Reading
from finetune.errors import DataError, ImageError
from finetune.storage.addresses import errors_named, open_address
from finetune.storage.files import atomic_path
from finetune.storage.store import mark_used


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at an address, which is read from its copy in the store. A missing copy is fetched."""

    address: str
    version: str  # another text once the file has changed
    n_bytes: int
    copy: Path

    def read(self, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
        check_bytes(self.n_bytes, limits)
        return read_bytes(self.fetch(), limits)

    def fetch(self) -> Path:
        """Return the path of the copy on disk; fetch it if it is missing.

        Raises:
            ImageError: the address cannot be read.
        """
        try:
            mark_used(self.copy)
        except FileNotFoundError:
            with _as_image_error(self.address), errors_named(self.address), atomic_path(self.copy, mode=0o600) as temporary:
                filesystem, path = open_address(self.address, os.getpid())
                filesystem.get_file(path, str(temporary))
        return self.copy

    def head(self) -> bytes:
        try:
            return self.beginning(HEAD_BYTES)
        except DataError:
            return b""

    def beginning(self, n_bytes: int) -> bytes:
        """Return the first bytes, without fetching the whole file.

        Raises:
            DataError: the address cannot be read.
        """
        if self.copy.exists():
            with open(self.copy, "rb") as stream:
                return stream.read(n_bytes)
        with errors_named(self.address):
            filesystem, path = open_address(self.address, os.getpid())
            data: bytes = filesystem.cat_file(path, start=0, end=n_bytes)
            return data

    def state(self) -> str | None:
        return self.version

    def __str__(self) -> str:
        return self.address


@dataclass
class RemoteTree:
    """The files below an address, as a tree."""

    name: str
    shown: str
    remarks: Sequence[str] = ()
    _root: Folder = field(default_factory=lambda: Folder("", ""), repr=False)

    def root(self) -> Folder:
        return self._root

    def find(self, path: str) -> Node | None:
        return find_in(self._root, os.path.normpath(path))


def open_remote(location: str, reading: Reading) -> Place:
    """Open an address.

    Raises:
        MissingExtra: no package for this kind of address is installed.
        DataError: the address does not exist or cannot be reached; the message of the library for this address is included.
    """
    if reading.roots is not None:
        raise DataError(f"{location}: addresses are not read here; upload the data, or name a folder of this server")
    from finetune.data.places.opening import open_packed, open_place

    if location.startswith("file://"):
        return open_place(Path(location.removeprefix("file://")), reading)
    files, is_single = _listing(location, reading)
    if not is_single:
        return Place(RemoteTree(_last_part(location), location, _root=_tree(location, files)))
    (file,) = files.values()
    if (kind := archive_kind(file.beginning(512))) is not None:
        try:
            return Place(open_packed(file.fetch(), kind, reading, location))
        except ImageError as error:
            raise DataError(f"{location}: {error.message}") from None
    above = location.rpartition("/")[0]
    around, _ = _listing(above, reading)
    tree = RemoteTree(_last_part(above), above, _root=_tree(above, around))
    return Place(tree, tree.find(_last_part(location)))


def _listing(location: str, reading: Reading) -> tuple[dict[str, RemoteFile], bool]:
    """Return all files at or below an address, by their addresses, and whether the address is that of a single file."""
    with errors_named(location):
        filesystem, path = open_address(location, os.getpid())
        is_single = bool(filesystem.isfile(path))
        found: Mapping[str, Mapping[str, Any]] = (
            {path: filesystem.info(path)} if is_single else filesystem.find(path, detail=True)
        )
        if not found:
            raise FileNotFoundError(location)
        files = {}
        for name, facts in sorted(found.items()):
            address = str(filesystem.unstrip_protocol(name))
            described = sorted((key, str(value)) for key, value in facts.items())
            version = hashlib.sha256(f"{address} {described}".encode("utf-8", "surrogatepass")).hexdigest()
            ending = f".{name.rpartition('.')[2].lower()}" if "." in name.rpartition("/")[2] else ""
            copy = reading.scratch("remote files") / version[:2] / f"{version}{ending if ending.isascii() else ''}"
            inside = address if is_single else name.removeprefix(path).lstrip("/")
            files[inside] = RemoteFile(address, version, int(facts.get("size") or 0), copy)
    missing = sum(file.n_bytes for file in files.values() if not file.copy.exists())
    reading.make_room(missing, location)
    return files, is_single


def _tree(location: str, files: Mapping[str, RemoteFile]) -> Folder:
    listed: list[tuple[Sequence[str], SourceFile]] = []
    for name, file in files.items():
        parts = [part for part in name.split("/") if part]
        if parts and ".." not in parts:
            listed.append((parts, file))
    if not listed:
        raise DataError(f"{location}: holds no files")
    return build_folder(listed)


def _last_part(location: str) -> str:
    return location.rstrip("/").rpartition("/")[2]


@contextmanager
def _as_image_error(address: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise ImageError(error.message.removeprefix(f"{address}: ")) from None
