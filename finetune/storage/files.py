"""Write files and folders atomically: under a temporary name first, renamed when complete. Also file locks.

A file or folder under its final name is therefore always complete, even if the process that wrote it was killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from finetune.errors import DamagedFile, DiskFull

TEMPORARY_SUFFIX = ".tmp"
"""The suffix of unfinished files and folders. Their names also begin with a dot."""


@contextlib.contextmanager
def atomic_path(target: Path, *, mode: int = 0o666) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success flush it to disk and rename it over `target`.

    Args:
        mode: permissions of the file, as far as the umask allows them.

    Raises:
        DiskFull: the disk filled up while writing; `target` is as it was before.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(target)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
        fsync_folder(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"{target}: the disk is full. Free some space and run the same command again; it resumes.") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`; on success rename it to `target`, replacing an existing one; on an error delete it.

    Raises:
        DiskFull: the disk filled up while writing; `target` is as it was before.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = _temporary_beside(target)
    folder.mkdir()
    try:
        yield folder
        for file in folder.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
        fsync_folder(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"{target}: the disk is full. Free some space and run the same command again; it resumes.") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def private_file(path: str, flags: int) -> int:
    """Open a file that only the user who creates it may read, and follow no link; an ``opener`` for `open`."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def write_atomic(target: Path, write: Callable[[IO[bytes]], object], *, mode: int = 0o666) -> None:
    """Write `target` atomically; `write` is called with the open binary file. See `atomic_path` for `mode`."""
    with atomic_path(target, mode=mode) as temporary, open(temporary, "wb") as stream:
        write(stream)


def write_json(target: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    data = json_text(value, indent=2).encode()
    write_atomic(target, lambda stream: stream.write(data + b"\n"))


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON text that UTF-8 can encode.

    A file name that is not UTF-8 reaches Python with lone surrogates, which only ASCII JSON can hold (as ``\\udcXX`` escapes).
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, allow_nan=False)
    return text


def read_json(path: Path) -> Any:
    """Return the decoded content of a JSON file.

    Raises:
        DamagedFile: the content is not JSON in UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFile(
            f"{path}: this file is damaged ({error}). Restore its folder from a backup, or delete the folder if it can be "
            f"made again"
        ) from None


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's content as hexadecimal text."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_under(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, in no particular order; links to folders are not followed.

    Folders that are deleted during the walk are skipped, where `Path.rglob` would raise `FileNotFoundError`.
    """
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name)


def found_in(folder: Path, pattern: str) -> list[Path]:
    """Return the paths in a folder that match a glob pattern, in no particular order.

    Paths that are deleted in the meantime are skipped, where `Path.glob` would raise `FileNotFoundError`.
    """
    return [folder / name for name in glob.glob(pattern, root_dir=folder, include_hidden=True)]


def modified_ns(path: Path) -> int | None:
    """Return the modification time of a file in nanoseconds since the epoch; None if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None


def folder_bytes(folder: Path) -> int:
    """Return the disk space of the files under a folder; files that are deleted during the walk count as 0."""
    total = 0
    for path in files_under(folder):
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            total += found.st_blocks * 512 if stat.S_ISREG(found.st_mode) else 0
    return total


def delete_temporary(folder: Path) -> None:
    """Delete the temporary files of killed processes under `folder`. Do not call it while another process writes there."""
    for parent, folders, files in os.walk(folder):
        for name in filter(_is_temporary, files):
            Path(parent, name).unlink(missing_ok=True)
        for name in filter(_is_temporary, folders):
            shutil.rmtree(Path(parent, name), ignore_errors=True)
        folders[:] = [name for name in folders if not _is_temporary(name)]


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on the file `path` while the block runs; yield whether the lock was acquired.

    The kernel releases the lock when the process dies. The file itself is not deleted. With `wait=False`, yields False at once if
    another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock on `path`.

    The kernel's list of locks is read instead of trying the lock, since a trial could make another process fail to acquire it.
    Always False on systems without ``/proc/locks``.
    """
    locks = Path("/proc/locks")
    try:
        inode, listed = str(path.stat().st_ino), locks.read_text()
    except FileNotFoundError:
        return False
    # "1: FLOCK  ADVISORY  WRITE 4711 08:01:1234567 0 EOF"; a process that waits for the lock is a line with "->".
    held = (line.split() for line in listed.splitlines() if "->" not in line)
    return any(fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode for fields in held)


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_beside(target: Path) -> Path:
    # File systems take names of 255 bytes: a long name is cut, the random part keeps it unique.
    stem = os.fsencode(target.name)[:180].decode("utf-8", "ignore")
    return target.with_name(f".{stem}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
