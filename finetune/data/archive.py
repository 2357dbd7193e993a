"""A zip, tar or tar.gz from a stranger → a folder of regular files, or one sentence that says which member was refused and why.

Members are read one by one and copied into files that this module creates; nothing is ever "extracted". The standard library's
own extraction has written outside its target and hung on malformed archives, so no member decides more than a checked relative
path: no links, no devices, no second spelling of a name. Every limit counts bytes that were really read. Torch-free.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import stat
import struct
import tarfile
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from finetune.errors import DataError, DiskFull

_CHUNK_BYTES = 1 << 20
_RATIO_ABOVE_BYTES = 1 << 20  # a small archive may compress as well as it likes
_DRIVES = tuple(f"{letter}:" for letter in "abcdefghijklmnopqrstuvwxyz")
_JUNK = ("__macosx", ".ds_store", "thumbs.db")


@dataclass(frozen=True)
class ArchiveLimits:
    """How much an archive may hold. `ratio` is bytes out for each byte of the archive, counted above a mebibyte."""

    members: int = 50_000
    member_bytes: int = 64 << 20
    total_bytes: int = 2 << 30
    ratio: float = 200.0
    depth: int = 4  # folders deep, the file included
    name_characters: int = 100  # of one path component
    seconds: float = 600.0


DEFAULT_LIMITS = ArchiveLimits()


@dataclass(frozen=True)
class Unpacked:
    """What was written."""

    kind: Literal["zip", "tar", "tar.gz"]
    n_files: int
    size_bytes: int


class ArchiveError(DataError):
    code = "invalid_archive"


def unpack_archive(source: Path, target: Path, *, limits: ArchiveLimits = DEFAULT_LIMITS) -> Unpacked:
    """Copy every regular file of the archive `source` under the folder `target`, which must not exist yet.

    `target` appears only when all of it has been written.

    Raises:
        ArchiveError: not an archive that is read, a refused member (named), or a limit that was passed (named with its value).
        DiskFull: no room for the contents.
    """
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    staging.mkdir(parents=True)
    try:
        with _reading_errors_named():
            unpacked = _Unpacking(source, staging, limits).run()
        os.rename(staging, target)
        return unpacked
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def archive_kind(head: bytes) -> Literal["zip", "tar", "tar.gz"] | None:
    """What the first 512 bytes of a file say it is; None for anything that is not read."""
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    if head[:2] == b"\x1f\x8b":
        return "tar.gz"
    if head[257:262] == b"ustar":
        return "tar"
    return None


class _Unpacking:
    """One archive being copied: what has been counted so far, and the names that are taken."""

    def __init__(self, source: Path, target: Path, limits: ArchiveLimits) -> None:
        self.source, self.target, self.limits = source, target, limits
        self.archive_bytes = source.stat().st_size
        self.n_members = self.n_files = self.size_bytes = 0
        self.names: set[str] = set()
        self.deadline = time.monotonic() + limits.seconds

    def run(self) -> Unpacked:
        with open(self.source, "rb") as stream:
            kind = archive_kind(stream.read(512))
        if kind is None:
            raise ArchiveError("this is not a zip, tar or tar.gz file (its first bytes say so, whatever its name is)")
        for name, contents in self._zip_members() if kind == "zip" else self._tar_members(kind):
            self._copy(name, contents)
        if self.n_files == 0:
            raise ArchiveError("the archive holds no files; put one folder of images for each class into it")
        return Unpacked(kind, self.n_files, self.size_bytes)

    def _zip_members(self) -> Iterator[tuple[str, IO[bytes]]]:
        with zipfile.ZipFile(self.source) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.header_offset)
            self._refuse_overlaps(members)
            for member in members:
                self._count_member(member.filename)
                kind = stat.S_IFMT(member.external_attr >> 16)
                if member.is_dir() or kind == stat.S_IFDIR:
                    self._checked_path(member.filename)
                elif kind not in (0, stat.S_IFREG):
                    raise _refused(member.filename, "is a link or a special file; only regular files are read")
                elif member.flag_bits & 0x1:
                    raise _refused(member.filename, "is encrypted; pack the images without a password")
                elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise _refused(
                        member.filename, "is compressed with a method that is not read; use plain zip compression (deflate)"
                    )
                else:
                    with archive.open(member) as contents:
                        yield member.filename, contents

    def _refuse_overlaps(self, members: list[zipfile.ZipInfo]) -> None:
        end = 0
        for member in members:
            if member.header_offset < end:
                raise _refused(member.filename, "shares its bytes with another member, as decompression bombs do")
            end = member.header_offset + 30 + member.compress_size

    def _tar_members(self, kind: Literal["tar", "tar.gz"]) -> Iterator[tuple[str, IO[bytes]]]:
        with open(self.source, "rb") as raw:
            plain: IO[bytes] = gzip.GzipFile(fileobj=raw) if kind == "tar.gz" else raw  # type: ignore[assignment]
            # "r|" reads forward only: a member with a lying size cannot send the reader back for ever
            with tarfile.open(fileobj=_Counted(plain, self._check_read), mode="r|") as archive:
                for member in archive:
                    self._count_member(member.name)
                    if member.isdir():
                        self._checked_path(member.name)
                    elif member.size < 0:
                        raise _refused(member.name, "has a negative size; the archive is malformed")
                    elif not member.isreg() or member.issparse():
                        raise _refused(member.name, "is a link or a special file; only regular files are read")
                    else:
                        contents = archive.extractfile(member)
                        if contents is not None:
                            yield member.name, contents

    def _count_member(self, name: str) -> None:
        self.n_members += 1
        if self.n_members > self.limits.members:
            raise ArchiveError(f"more than {self.limits.members:,} members; split the dataset or give a folder on the server")
        if time.monotonic() > self.deadline:
            raise _refused(name, f"was not reached within {self.limits.seconds:.0f} s")

    def _check_read(self, n_bytes: int) -> None:
        """What came out of a compressed stream so far, headers included."""
        if n_bytes > self.limits.ratio * self.archive_bytes + _RATIO_ABOVE_BYTES:
            raise ArchiveError(f"it unpacks to more than {self.limits.ratio:.0f} times its size, as decompression bombs do")
        if n_bytes > 2 * self.limits.total_bytes + _RATIO_ABOVE_BYTES:  # headers that describe nothing
            raise ArchiveError(f"it unpacks to far more than {self.limits.total_bytes >> 20:,} MiB, the limit for one archive")

    def _copy(self, name: str, contents: IO[bytes]) -> None:
        path = self._checked_path(name)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        written = 0
        with open(descriptor, "wb") as output:
            while chunk := contents.read(_CHUNK_BYTES):
                written += len(chunk)
                self.size_bytes += len(chunk)
                if written > self.limits.member_bytes:
                    raise _refused(name, f"is larger than {self.limits.member_bytes >> 20} MiB, the limit for one file")
                if self.size_bytes > self.limits.total_bytes:
                    raise _refused(
                        name, f"takes the contents over {self.limits.total_bytes >> 20:,} MiB, the limit for one archive"
                    )
                self._check_read(self.size_bytes)
                output.write(chunk)
        self.n_files += 1

    def _checked_path(self, name: str) -> Path | None:
        """Where a member goes: a relative path of checked components; None for what file managers leave behind."""
        text = unicodedata.normalize("NFC", name)
        if "\\" in text:
            raise _refused(name, "has a backslash in its name")
        if text.startswith("/") or text[:2].lower() in _DRIVES:
            raise _refused(name, "has an absolute path")
        parts = [part for part in text.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise _refused(name, "points out of the archive with '..'")
        if any(unicodedata.category(character).startswith("C") for character in text):
            raise _refused(name, "has a control or direction character in its name")
        if any(part.lower() in _JUNK or part.startswith("._") for part in parts):
            return None
        if len(parts) > self.limits.depth:
            raise _refused(name, f"lies more than {self.limits.depth} folders deep; use class/image.jpg or train/class/image.jpg")
        if any(len(part) > self.limits.name_characters or len(part.encode()) > 255 for part in parts):
            raise _refused(name, f"has a name of more than {self.limits.name_characters} characters")
        if not parts or name.endswith("/"):
            return None
        spelling = "/".join(parts).casefold()
        if spelling in self.names:
            raise _refused(name, "occurs twice (names that differ only by case count as one)")
        self.names.add(spelling)
        return self.target.joinpath(*parts)


class _Counted(io.RawIOBase):
    """A readable stream that reports how many bytes have been read from it."""

    def __init__(self, stream: IO[bytes], report: object) -> None:
        self.stream, self.report, self.n_bytes = stream, report, 0

    def read(self, size: int = -1) -> bytes:
        chunk = self.stream.read(size)
        self.n_bytes += len(chunk)
        self.report(self.n_bytes)  # type: ignore[operator]
        return chunk


def _refused(name: str, why: str) -> ArchiveError:
    shown = name if len(name) <= 120 else name[:117] + "…"
    return ArchiveError(f"member {shown!r} {why}")


@contextmanager
def _reading_errors_named() -> Iterator[None]:
    try:
        yield
    except ArchiveError:
        raise
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError, UnicodeError) as error:
        raise ArchiveError(f"the archive is damaged or incomplete ({error}); pack and upload it again") from error
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, struct.error) as error:
        # what the standard library's readers let through on malformed headers
        raise ArchiveError(f"the archive is malformed ({error}); pack it again with zip or tar") from error
    except OSError as error:
        if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
            raise ArchiveError(f"the archive has a file and a folder of one name: {Path(error.filename).name!r}") from error
        if error.errno in (28, 122):
            raise DiskFull("the disk is full; free some space and upload the archive again") from error
        raise
