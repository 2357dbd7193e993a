"""Types for the encoded bytes of one image: a file on disk, a member of an archive, a cell of a table. Torch-free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from finetune.bundle.image import read_bytes
from finetune.bundle.image_formats import HEAD_BYTES
from finetune.bundle.image_limits import DEFAULT_LIMITS, ImageLimits, check_bytes
from finetune.data.archive import Member, read_member
from finetune.errors import ImageError
from finetune.messages import printable


class ImageFile(Protocol):
    """The protocol for the encoded bytes of one image. ``str()`` returns their location as printable text."""

    def read(self, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
        """Return the file's bytes.

        Raises:
            ImageError: it cannot be read, or is larger than `limits` allow.
        """
        ...


@runtime_checkable
class SourceFile(ImageFile, Protocol):
    """The protocol for a file of a place, of any kind."""

    def head(self) -> bytes:
        """Return the first bytes, enough to recognise an image; empty if the file cannot be read."""
        ...

    def state(self) -> str | None:
        """Return a text that changes whenever the bytes change, without reading them; None if it is not known."""
        ...


@dataclass(frozen=True, slots=True)
class LocalFile:
    """An image file on a local disk."""

    path: Path

    def read(self, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
        return read_bytes(self.path, limits)

    def head(self) -> bytes:
        try:
            with open(self.path, "rb", buffering=0) as stream:
                return stream.read(HEAD_BYTES) or b""
        except OSError:
            return b""

    def state(self) -> str | None:
        return state_of(self.path)

    def __str__(self) -> str:
        return printable(self.path)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An image that is stored under the sha256 of its bytes (`finetune.data.contents`)."""

    path: Path
    name: str  # what it was called

    def read(self, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
        return read_bytes(self.path, limits)

    def head(self) -> bytes:
        return LocalFile(self.path).head()

    def state(self) -> str | None:
        return state_of(self.path)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class MemberFile:
    """An image in a zip or tar, which is not unpacked.

    A damaged member raises `ArchiveError` and not `ImageError`, because the archive is damaged and not an image.
    """

    archive: Path
    member: Member
    name: str

    def read(self, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
        check_bytes(self.member.size_bytes, limits)
        try:
            return read_member(self.archive, self.member)
        except OSError as error:
            raise ImageError(f"the archive cannot be read: {error.strerror or error}") from None

    def head(self) -> bytes:
        return self.read()[:HEAD_BYTES] if self.member.size_bytes <= DEFAULT_LIMITS.max_bytes else b""

    def state(self) -> str | None:
        archive = state_of(self.archive)
        return None if archive is None else f"{archive} {self.member.offset} {self.member.size_bytes}"

    def __str__(self) -> str:
        return self.name


def state_of(path: Path) -> str | None:
    """Return a text that identifies this version of a file: its place on the disk, its size and its times, to the nanosecond."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
