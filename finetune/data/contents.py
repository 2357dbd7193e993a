"""Store the contents of an archive in a folder: each file under its sha256, with its name only in a list. Torch-free.

No name from an archive becomes a path on disk. Therefore names cannot lead out of the folder, be too long or collide by case,
identical files are stored once, and their digests are known without reading them again.

    members.jsonl   one line for each member: name (or raw, in hexadecimal, if its encoding is unknown), sha256, bytes
    objects/ab/…    the files, named by their sha256
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from finetune.data.archive import (
    DEFAULT_LIMITS,
    ArchiveError,
    ArchiveLimits,
    Kind,
    kind_of_file,
    reading_errors_named,
    stream_members,
)
from finetune.errors import DataError, DiskFull
from finetune.storage.files import private_file

MEMBERS, OBJECTS = "members.jsonl", "objects"


@dataclass(frozen=True)
class Unpacked:
    """The result of unpacking."""

    kind: Kind
    n_files: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ListedMember:
    """One line of ``members.jsonl``: a file, or a folder that the archive contains as a member."""

    name: bytes
    is_utf8: bool
    sha256: str  # empty for a folder
    size_bytes: int = 0


def unpack_archive(archive_path: Path, target: Path, *, limits: ArchiveLimits = DEFAULT_LIMITS) -> Unpacked:
    """Write every regular file of the archive at `archive_path` into the folder `target`, which must not exist yet.

    `target` is created only after everything has been written.

    Raises:
        ArchiveError: it is no archive that can be read, a member is refused, or a limit is exceeded; the message names it.
        DiskFull: the disk has no room for the contents.
    """
    with reading_errors_named(), _appearing(target) as writer:
        for member, chunks in stream_members(archive_path, limits):
            if member.is_folder:
                writer.folder(member.name, member.is_utf8)
            else:
                writer.file(member.name, member.is_utf8, chunks)
        if writer.n_files == 0:
            raise ArchiveError("the archive holds no files; put one folder of images for each class into it")
    kind = kind_of_file(archive_path)
    assert kind is not None
    return Unpacked(kind, writer.n_files, writer.size_bytes)


def store_file(file: Path, name: str, target: Path) -> int:
    """Store a single file in the new folder `target`, as its only member, under `name`; return its size."""
    with _appearing(target) as writer, open(file, "rb") as stream:
        writer.file(name.encode("utf-8", "surrogateescape"), True, iter(lambda: stream.read(1 << 20), b""))
    return writer.size_bytes


def link_files(members: Iterable[tuple[str, Path]], target: Path) -> int:
    """Make the new folder `target` of files of another such folder under new names, as hard links; return their size.

    Args:
        members: names, and the paths of the files in the other folder, which is on the same disk.
    """
    with _appearing(target) as writer:
        for name, path in members:
            writer.link(name, path)
    return writer.size_bytes


def is_contents(folder: Path) -> bool:
    """Return whether a folder is one that `unpack_archive` wrote."""
    return (folder / MEMBERS).is_file() and (folder / OBJECTS).is_dir()


def read_members(folder: Path) -> list[ListedMember]:
    """Return the list of such a folder.

    Raises:
        DataError: the list is damaged.
    """
    members = []
    with open(folder / MEMBERS, encoding="utf-8") as lines:
        for line in lines:
            try:
                members.append(_listed_member(json.loads(line)))
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{folder}: its list of members is damaged; upload the archive again") from None
    return members


def object_path(folder: Path, sha256: str) -> Path:
    """Return the path of the file with this digest."""
    return folder / OBJECTS / sha256[:2] / sha256


def _listed_member(line: dict[str, Any]) -> ListedMember:
    name = bytes.fromhex(line["raw"]) if "raw" in line else str(line["name"]).encode("utf-8", "surrogateescape")
    sha256 = str(line.get("sha256", ""))
    if sha256 and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(sha256)
    return ListedMember(name, "raw" not in line, sha256, int(line.get("bytes", 0)))


class _Writer:
    def __init__(self, folder: Path, members: IO[str]) -> None:
        self.root, self.members = folder, members
        self.n_files = self.size_bytes = 0
        (folder / OBJECTS).mkdir()

    def folder(self, name: bytes, is_utf8: bool) -> None:
        self._list(name, is_utf8, {})

    def file(self, name: bytes, is_utf8: bool, chunks: Iterable[bytes]) -> None:
        temporary = self.root / OBJECTS / ".arriving"
        digest, n_bytes = hashlib.sha256(), 0
        with open(temporary, "wb", opener=private_file) as output:
            for chunk in chunks:
                digest.update(chunk)
                n_bytes += len(chunk)
                output.write(chunk)
        place = object_path(self.root, digest.hexdigest())
        place.parent.mkdir(exist_ok=True)
        os.replace(temporary, place)
        self.n_files += 1
        self.size_bytes += n_bytes
        self._list(name, is_utf8, {"sha256": digest.hexdigest(), "bytes": n_bytes})

    def link(self, name: str, path: Path) -> None:
        place = object_path(self.root, path.name)
        place.parent.mkdir(exist_ok=True)
        if not place.exists():
            os.link(path, place)
        n_bytes = place.stat().st_size
        self.n_files += 1
        self.size_bytes += n_bytes
        self._list(name.encode("utf-8", "surrogateescape"), True, {"sha256": path.name, "bytes": n_bytes})

    def _list(self, name: bytes, is_utf8: bool, facts: dict[str, Any]) -> None:
        described = {"name": name.decode()} if is_utf8 or name.isascii() else {"raw": name.hex()}
        self.members.write(json.dumps({**described, **facts}, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[_Writer]:
    """Yield a writer into a new folder that is renamed to `target` at the end of the block; on an error it is deleted."""
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    staging.mkdir(mode=0o700, parents=True)
    try:
        with open(staging / MEMBERS, "w", encoding="utf-8", opener=private_file) as members:
            yield _Writer(staging, members)
        (staging / OBJECTS / ".arriving").unlink(missing_ok=True)
        os.rename(staging, target)
    except UnicodeDecodeError:
        raise ArchiveError(
            "the archive is malformed (a name that is marked as UTF-8 is not valid UTF-8); pack it again"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("the disk is full; free some space and upload the archive again") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
