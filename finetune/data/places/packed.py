"""Open an archive without unpacking it, or a folder of uploaded contents; in both, names are bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.archive import OWN_LIMITS, ArchiveLimits, list_members, refused
from finetune.data.contents import object_path, read_members
from finetune.data.files import MemberFile, SourceFile, StoredFile
from finetune.data.names import NameRefused, checked_parts, decode_names
from finetune.data.places.tree import Folder, Node, build_folder, find_in
from finetune.errors import DataError
from finetune.messages import printable
from finetune.naming import without_archive_ending


@dataclass
class PackedTree:
    """The members of an archive, with checked names, as a tree."""

    name: str
    shown: str
    remarks: Sequence[str]
    _root: Folder = field(repr=False)

    def root(self) -> Folder:
        return self._root

    def find(self, path: str) -> Node | None:
        return find_in(self._root, path)


def open_archive(
    path: Path, *, name_encoding: str = "auto", limits: ArchiveLimits = OWN_LIMITS, shown: str | None = None
) -> PackedTree:
    """Open a zip or tar without unpacking it.

    Args:
        shown: its name in messages.

    Raises:
        ArchiveError: it is refused; the member is named.
    """
    members = list_members(path, limits)
    names = _names([(member.name, member.is_utf8) for member in members], name_encoding)
    shown = printable(path) if shown is None else shown
    files: list[tuple[Sequence[str], SourceFile]] = []
    folders: list[Sequence[str]] = []
    for member, parts in zip(members, names.parts, strict=True):
        if member.is_folder:
            folders.append(parts)
        else:
            files.append((parts, MemberFile(path, member, f"{shown}/{printable('/'.join(parts))}")))
    return PackedTree(without_archive_ending(Path(shown).name), shown, names.remarks, build_folder(files, folders))


def open_contents(folder: Path, *, name_encoding: str = "auto", shown: str | None = None) -> PackedTree:
    """Open a folder that `finetune.data.contents` wrote.

    Args:
        shown: its name in messages.
    """
    held = read_members(folder)
    names = _names([(one.name, one.is_utf8) for one in held], name_encoding)
    shown = printable(folder) if shown is None else shown
    files: list[tuple[Sequence[str], SourceFile]] = []
    folders: list[Sequence[str]] = []
    for one, parts in zip(held, names.parts, strict=True):
        if one.sha256:
            file = StoredFile(object_path(folder, one.sha256), f"{shown}/{printable('/'.join(parts))}")
            files.append((parts, file))
        else:
            folders.append(parts)
    return PackedTree(folder.name, shown, names.remarks, build_folder(files, folders))


@dataclass(frozen=True)
class _Names:
    parts: Sequence[tuple[str, ...]]
    remarks: tuple[str, ...]


def _names(raw: Sequence[tuple[bytes, bool]], encoding: str) -> _Names:
    """Decode and check names; names of unknown encoding are decoded together."""
    untold = [name for name, is_utf8 in raw if not is_utf8 or not _is_valid(name)]
    try:
        decoded = decode_names(untold, encoding)
    except NameRefused as why:
        raise DataError(str(why)) from None
    texts = dict(zip(untold, decoded.texts, strict=True))
    parts = []
    for name, _ in raw:
        try:
            parts.append(checked_parts(texts.get(name) or name.decode("utf-8", "surrogateescape")))
        except NameRefused as why:
            raise refused(name, str(why)) from None
    return _Names(parts, () if decoded.remark is None else (decoded.remark,))


def _is_valid(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True
