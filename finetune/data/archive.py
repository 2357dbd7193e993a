"""Read zip, tar and tar.gz archives that are not trusted, member by member; refuse bad members with the reason. Torch-free.

Members are read with code of this module, and a member's name never becomes a path on disk. The extraction of the standard
library is not used, because it has written outside its target and hung on malformed archives. Links, devices and encryption are
refused, and every limit counts bytes that were actually read. A zip or tar on the user's own disk is read in place. A tar.gz,
which can only be read from its beginning, and every upload are unpacked into `finetune.data.contents` first.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from finetune.data.names import NameRefused, checked_parts
from finetune.errors import DataError, DiskFull
from finetune.messages import printable

Kind = Literal["zip", "tar", "tar.gz"]

_CHUNK_BYTES = 1 << 20
_RATIO_ABOVE_BYTES = 1 << 20  # the ratio of smaller archives is not limited
_JUNK = (b"__macosx", b".ds_store", b"thumbs.db")
_TABLE_ENDINGS = (b".parquet", b".arrow", b".csv", b".tsv", b".json", b".jsonl", b".ndjson")
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_UTF8_FLAG, _ENCRYPTED_FLAG = 0x800, 0x1
_UNICODE_PATH = 0x7075  # a zip's extra field with a member's name in UTF-8


@dataclass(frozen=True)
class ArchiveLimits:
    """Limits on the contents of an archive. `ratio` is unpacked bytes per byte of the archive, above one mebibyte."""

    members: int = 50_000
    member_bytes: int = 64 << 20
    table_bytes: int = 1 << 30  # of a member that is a table, which may hold many images
    total_bytes: int = 2 << 30
    ratio: float = 200.0
    depth: int = 64  # folders deep, the file included
    seconds: float = 600.0


DEFAULT_LIMITS = ArchiveLimits()
OWN_LIMITS = ArchiveLimits(members=5_000_000, table_bytes=1 << 40, total_bytes=1 << 45, seconds=86_400.0)
"""For an archive that users name on their own command line: the same safety rules, but practically no limit on size."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in an archive, or a folder that it lists."""

    name: bytes  # as stored in the archive, in any encoding
    is_utf8: bool  # the archive says that the name is UTF-8
    is_folder: bool
    size_bytes: int
    offset: int  # of a zip's local header, of a tar's data
    packed_bytes: int
    method: int  # how it is compressed: a zip's number; stored in a tar
    checksum: int | None  # CRC-32

    def __str__(self) -> str:
        return printable(self.name.decode("utf-8", "surrogateescape"))


class ArchiveError(DataError):
    code = "invalid_archive"


def archive_kind(head: bytes) -> Kind | None:
    """Return the kind of archive by the first 512 bytes of a file; None if it is none that can be read."""
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    if head[:2] == b"\x1f\x8b":
        return "tar.gz"
    return "tar" if head[257:262] == b"ustar" else None


def kind_of_file(path: Path) -> Kind | None:
    """Return the `archive_kind` of a file on disk."""
    with open(path, "rb") as stream:
        return archive_kind(stream.read(512))


def list_members(archive_path: Path, limits: ArchiveLimits = DEFAULT_LIMITS) -> list[Member]:
    """List the members of a zip or tar without reading their contents. Files that file managers create are left out.

    Raises:
        ArchiveError: it is no such archive, a member is refused, or a limit is exceeded; the message names the member or the
            limit.
    """
    with reading_errors_named():
        kind = kind_of_file(archive_path)
        if kind is None:
            raise ArchiveError(NOT_AN_ARCHIVE)
        rules = _Rules(archive_path.stat().st_size, limits)
        if kind == "zip":
            return [member for member in _zip_members(archive_path, rules) if rules.accepts(member)]
        with open(archive_path, "rb") as stream:
            return [member for member, _ in _tar_members(stream, rules) if rules.accepts(member)]


NOT_AN_ARCHIVE = "this is not a zip, tar or tar.gz file (its first bytes say so, whatever its name is)"


def read_member(archive_path: Path, member: Member) -> bytes:
    """Return the contents of a member of a zip or tar that `list_members` listed.

    Raises:
        ArchiveError: they are damaged, or differ from the archive's directory; the member is named.
    """
    with reading_errors_named():
        return b"".join(_chunks(archive_path, member))


def stream_members(archive_path: Path, limits: ArchiveLimits = DEFAULT_LIMITS) -> Iterator[tuple[Member, Iterator[bytes]]]:
    """Yield every member with its contents, in chunks that must be read before the next member; raise as `list_members` does.

    The chunks are read outside this function, so the caller must wrap the reading in `reading_errors_named` too.
    """
    with reading_errors_named():
        kind = kind_of_file(archive_path)
        if kind is None:
            raise ArchiveError(NOT_AN_ARCHIVE)
        rules = _Rules(archive_path.stat().st_size, limits)
        if kind == "zip":
            for member in _zip_members(archive_path, rules):
                if rules.accepts(member):
                    yield member, rules.counted(member, _chunks(archive_path, member))
            return
        with open(archive_path, "rb") as raw:
            plain: IO[bytes] = gzip.GzipFile(fileobj=raw) if kind == "tar.gz" else raw  # type: ignore[assignment]
            for member, contents in _tar_members(plain, rules):
                if rules.accepts(member):
                    yield member, rules.counted(member, contents)


class _Rules:
    """Checks the members of one archive against the limits; counts them and remembers their names."""

    def __init__(self, archive_bytes: int, limits: ArchiveLimits) -> None:
        self.archive_bytes, self.limits = archive_bytes, limits
        self.n_members = self.size_bytes = 0
        self.files: set[str] = set()
        self.folders: set[str] = set()
        self.deadline = time.monotonic() + limits.seconds

    def count(self, name: object) -> None:
        """Count a member of any kind."""
        self.n_members += 1
        if self.n_members > self.limits.members:
            raise ArchiveError(f"more than {self.limits.members:,} members; split the dataset or give a folder on the server")
        if time.monotonic() > self.deadline:
            raise refused(name, f"was not reached within {self.limits.seconds:.0f} s")

    def accepts(self, member: Member) -> bool:
        """Check a member's name and size; return False for files that file managers create."""
        try:
            parts = checked_parts(member.name.decode("utf-8", "surrogateescape"), max_depth=self.limits.depth)
        except NameRefused as why:
            raise refused(member, str(why)) from None
        lower = member.name.lower().replace(b"\\", b"/").split(b"/")
        if not parts or any(part in _JUNK or part.startswith(b"._") for part in lower):
            return False
        if member.size_bytes > (most := self._most(member)):
            raise refused(member, f"is larger than {most >> 20:,} MiB, the limit for one file")
        self._remember(member, parts)
        return True

    def _most(self, member: Member) -> int:
        is_table = member.name.lower().endswith(_TABLE_ENDINGS)
        return self.limits.table_bytes if is_table else self.limits.member_bytes

    def _remember(self, member: Member, parts: tuple[str, ...]) -> None:
        path = "/".join(parts)
        around = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
        if member.is_folder:
            around.append(path)
        elif path in self.files:
            raise refused(member, "occurs twice")
        else:
            self.files.add(path)
        self.folders.update(around)
        if (path in self.files and path in self.folders) or not self.files.isdisjoint(around):
            raise refused(member, "has the name of both a file and a folder of this archive")

    def counted(self, member: Member, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the contents of a member, and count the bytes that are actually read."""
        read, most = 0, self._most(member)
        for chunk in chunks:
            read += len(chunk)
            self.size_bytes += len(chunk)
            if read > most:
                raise refused(member, f"is larger than {most >> 20:,} MiB, the limit for one file")
            if self.size_bytes > self.limits.total_bytes:
                raise refused(member, f"takes the contents over {self.limits.total_bytes >> 20:,} MiB, the limit for one archive")
            self.check_ratio(self.size_bytes)
            if time.monotonic() > self.deadline:
                raise refused(member, f"was not read within {self.limits.seconds:.0f} s")
            yield chunk

    def check_ratio(self, n_bytes: int) -> None:
        """Refuse an archive that unpacks to far more bytes than it has; `n_bytes` is the number so far, including headers."""
        if n_bytes > self.limits.ratio * self.archive_bytes + _RATIO_ABOVE_BYTES:
            raise ArchiveError(f"it unpacks to more than {self.limits.ratio:.0f} times its size, as decompression bombs do")
        if n_bytes > 2 * self.limits.total_bytes + _RATIO_ABOVE_BYTES:  # an archive of headers without contents
            raise ArchiveError(f"it unpacks to far more than {self.limits.total_bytes >> 20:,} MiB, the limit for one archive")


# ---------------------------------------------------------------------------------------------------------------------- zip


def _zip_members(archive_path: Path, rules: _Rules) -> Iterator[Member]:
    with zipfile.ZipFile(archive_path) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    _refuse_overlaps(entries)
    declared = 0
    for entry in entries:
        member = _zip_member(entry)
        rules.count(member)
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise refused(member, "is a link or a special file; only regular files are read")
        if entry.flag_bits & _ENCRYPTED_FLAG:
            raise refused(member, "is encrypted; pack the images without a password")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refused(member, "is compressed with a method that is not read; use plain zip compression (deflate)")
        declared += entry.file_size
        if declared > rules.limits.total_bytes:
            raise refused(member, f"takes the contents over {rules.limits.total_bytes >> 20:,} MiB, the limit for one archive")
        rules.check_ratio(declared)
        yield member


def _zip_member(entry: zipfile.ZipInfo) -> Member:
    is_utf8 = bool(entry.flag_bits & _UTF8_FLAG)
    name = entry.orig_filename.encode("utf-8" if is_utf8 else "cp437")
    if not is_utf8 and (in_utf8 := _unicode_path(entry.extra, name)) is not None:
        name, is_utf8 = in_utf8, True
    is_folder = name.endswith((b"/", b"\\")) or stat.S_IFMT(entry.external_attr >> 16) == stat.S_IFDIR
    return Member(
        name=name,
        is_utf8=is_utf8,
        is_folder=is_folder,
        size_bytes=entry.file_size,
        offset=entry.header_offset,
        packed_bytes=entry.compress_size,
        method=entry.compress_type,
        checksum=entry.CRC,
    )


def _unicode_path(extra: bytes, name: bytes) -> bytes | None:
    """Return the name in UTF-8 that some programs store in addition to `name`; None if there is none for it."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        body, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and len(body) > 5 and body[0] == 1 and struct.unpack_from("<L", body, 1)[0] == zlib.crc32(name):
            return body[5:]
    return None


def _refuse_overlaps(entries: list[zipfile.ZipInfo]) -> None:
    end = 0
    for entry in entries:
        if entry.header_offset < end:
            raise refused(_zip_member(entry), "shares its bytes with another member, as decompression bombs do")
        end = entry.header_offset + _LOCAL_HEADER.size + entry.compress_size


def _chunks(archive_path: Path, member: Member) -> Iterator[bytes]:
    """Yield the contents of a member of a zip or tar; check their size and checksum against the archive's directory."""
    descriptor = os.open(archive_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        checksum = written = 0
        for chunk in _unpacked(descriptor, member):
            written += len(chunk)
            if written > member.size_bytes:
                break
            if member.checksum is not None:
                checksum = zlib.crc32(chunk, checksum)
            yield chunk
        if written != member.size_bytes:
            raise refused(member, "is damaged: it has another size than the archive's directory says; pack it again")
        if member.checksum is not None and checksum != member.checksum:
            raise refused(member, "is damaged: its checksum is another than the archive's directory says; pack it again")
    except zlib.error as error:
        raise refused(member, f"is damaged ({error}); pack it again") from None
    finally:
        os.close(descriptor)


def _unpacked(descriptor: int, member: Member) -> Iterator[bytes]:
    start = member.offset if member.checksum is None else _start_of_data(descriptor, member)
    packed = _read_exactly(descriptor, start, member)
    if member.method == zipfile.ZIP_STORED:
        yield from packed
        return
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    for chunk in packed:
        while chunk:
            yield inflate.decompress(chunk, _CHUNK_BYTES)
            chunk = inflate.unconsumed_tail
    while not inflate.eof:  # the decompressor still holds output that did not fit into one chunk
        rest = inflate.decompress(b"", _CHUNK_BYTES)
        if not rest:
            raise refused(member, "is damaged: its data ends too early; pack it again")
        yield rest


def _read_exactly(descriptor: int, start: int, member: Member) -> Iterator[bytes]:
    end = start + member.packed_bytes
    while start < end:
        chunk = os.pread(descriptor, min(_CHUNK_BYTES, end - start), start)
        if not chunk:
            raise refused(member, "is damaged: the archive ends before it does; pack it again")
        start += len(chunk)
        yield chunk


def _start_of_data(descriptor: int, member: Member) -> int:
    header = os.pread(descriptor, _LOCAL_HEADER.size, member.offset)
    if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise refused(member, "is damaged: it does not begin where the archive's directory says; pack it again")
    fields = _LOCAL_HEADER.unpack(header)
    flags, method, name_bytes, extra_bytes = fields[2], fields[3], fields[9], fields[10]
    if flags & _ENCRYPTED_FLAG or method != member.method:
        raise refused(member, "is damaged: its own header differs from the archive's directory; pack it again")
    return member.offset + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)


# ---------------------------------------------------------------------------------------------------------------------- tar


def _tar_members(stream: IO[bytes], rules: _Rules) -> Iterator[tuple[Member, Iterator[bytes]]]:
    # "r|" reads forward only, so a wrong size in a header cannot make the reader go back again and again
    counted = _Counted(stream, rules.check_ratio)
    with tarfile.open(fileobj=counted, mode="r|", encoding="utf-8", errors="surrogateescape") as archive:
        for entry in archive:
            name = entry.name.encode("utf-8", "surrogateescape")
            member = Member(name, _is_utf8(name), entry.isdir(), entry.size, entry.offset_data, entry.size, 0, None)
            rules.count(member)
            if entry.size < 0:
                raise refused(member, "has a negative size; the archive is malformed")
            if not entry.isdir() and (not entry.isreg() or entry.issparse()):
                raise refused(member, "is a link or a special file; only regular files are read")
            contents = None if entry.isdir() else archive.extractfile(entry)
            yield member, iter(()) if contents is None else _read_chunks(contents, member)


def _read_chunks(contents: IO[bytes], member: Member) -> Iterator[bytes]:
    n_bytes = 0
    while chunk := contents.read(_CHUNK_BYTES):
        n_bytes += len(chunk)
        yield chunk
    if n_bytes != member.size_bytes:
        raise refused(member, "is damaged: the archive ends before it does; pack it again")


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


class _Counted(io.RawIOBase):
    """A readable stream that reports how many bytes have been read from it."""

    def __init__(self, stream: IO[bytes], report: Callable[[int], None]) -> None:
        self.stream, self.report, self.n_bytes = stream, report, 0

    def read(self, size: int = -1) -> bytes:
        chunk = self.stream.read(size)
        self.n_bytes += len(chunk)
        self.report(self.n_bytes)
        return chunk


# ------------------------------------------------------------------------------------------------------------------- errors


def refused(name: object, why: str) -> ArchiveError:
    """Return the error that refuses an archive because of one member."""
    shown = printable(name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name))
    return ArchiveError(f"member '{shown if len(shown) <= 120 else shown[:117] + '…'}' {why}")


@contextmanager
def reading_errors_named() -> Iterator[None]:
    """Raise `ArchiveError` with one sentence for the exceptions that the standard library raises on damaged archives."""
    try:
        yield
    except DataError:
        raise
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError, UnicodeError) as error:
        raise ArchiveError(f"the archive is damaged or incomplete ({error}); pack and upload it again") from error
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, struct.error) as error:
        # raised inside the standard library for malformed headers
        raise ArchiveError(f"the archive is malformed ({error}); pack it again with zip or tar") from error
    except OSError as error:
        if error.errno in (28, 122):
            raise DiskFull("the disk is full; free some space and upload the archive again") from error
        raise
