"""Back up a workspace into one tar file and restore it: databases, uploads, runs, models and MLflow's artifacts. Torch-free.

The databases are copied first, each as a consistent snapshot, while other processes may use them. Files are in place before the
row that refers to them is committed, so the backup contains every file that the copied rows refer to, unless it was deleted in
the meantime. Left out are files that are recomputed when missing (``cache/``) and files of running processes (locks, leases,
unfinished uploads). ``backup.json``, written last, lists every file with its sha256; a backup without it is incomplete.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from finetune.errors import Conflict, InvalidInput
from finetune.messages import printable
from finetune.storage.files import TEMPORARY_SUFFIX, atomic_path
from finetune.storage.rundir import RunDir

MANIFEST = "backup.json"
SCHEMA_VERSION = 1
FOLDERS = ("files", "runs", "models", "acknowledged", "mlartifacts")
JOBS, MLFLOW = "jobs.db", "mlflow.db"
_LEFT_OUT = re.compile(
    rf"\.lock|\..*\.lock|\.arriving-.*|\.upload-.*|\.leaving-.*|lease-\d+|\..*{re.escape(TEMPORARY_SUFFIX)}|sampled-inputs"
)
_WITH_PATHS = (".json", ".jsonl", ".yaml")  # files of a run that may contain paths of the workspace
_LARGEST_REWRITTEN_BYTES = 256 << 20
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Backup:
    """The description of a backup."""

    root: Path  # of the workspace that was backed up
    created_at: float
    n_files: int
    size_bytes: int  # of the files, unpacked


def write_backup(root: Path, target: Path, *, jobs_database: Path | None) -> Backup:
    """Write the workspace in the folder `root` to the tar file `target`, atomically.

    Args:
        jobs_database: the SQLite file of the jobs; None if they are in another database.

    Raises:
        InvalidInput: `root` is not a workspace.
    """
    root = root.absolute()
    if not any((root / name).exists() for name in (*FOLDERS, JOBS)):
        raise InvalidInput(f"{printable(root)}: holds no workspace (none of {', '.join((*FOLDERS, JOBS))})")
    files: dict[str, dict[str, Any]] = {}
    with (
        atomic_path(target, mode=0o600) as temporary,
        tarfile.open(temporary, "w") as archive,
    ):  # it has images and webhooks' secrets
        for name, database in ((JOBS, jobs_database), (MLFLOW, root / MLFLOW)):
            if database is not None and database.exists():
                with _copied(database) as copy:
                    files[name] = _add(archive, name, copy)
        for path in _files_of(root):
            with contextlib.suppress(FileNotFoundError):  # deleted in the meantime
                name = path.relative_to(root).as_posix()
                files[name] = _add(archive, name, path)
        made = Backup(root, time.time(), len(files), sum(file["bytes"] for file in files.values()))
        document = {
            "schema_version": SCHEMA_VERSION, "root": str(root), "created_at": made.created_at, "files": files,
        }  # fmt: skip
        text = json.dumps(document).encode()
        _add_stream(archive, MANIFEST, io.BytesIO(text), len(text), made.created_at)
    return made


def restore_backup(backup_file: Path, root: Path) -> Backup:
    """Restore a backup into the folder `root`, which must be missing or empty; the folder appears complete or not at all.

    If `root` differs from the backed-up workspace's path, that path is replaced by the new one in the databases and runs. Runs
    that were not finished begin anew then, because their checkpoints belong to a spec with the old path.

    Raises:
        Conflict: `root` is not empty.
        InvalidInput: `backup_file` is not a backup, is incomplete, or was changed after it was written.
    """
    root = root.absolute()
    if root.exists() and any(root.iterdir()):
        raise Conflict(f"{printable(root)} is not empty; restore into a new folder (FINETUNE_HOME names it)")
    root.parent.mkdir(parents=True, exist_ok=True)
    arriving = root.with_name(f".{root.name}-restoring-{os.getpid()}")
    arriving.mkdir(mode=0o700)
    try:
        made, files = _unpack(backup_file, arriving)
        for name, file in files.items():
            _check(backup_file, arriving, name, file)
        if made.root != root:
            _move_paths(arriving, str(made.root), str(root))
        if root.exists():
            root.rmdir()
        arriving.rename(root)
    except BaseException:
        shutil.rmtree(arriving, ignore_errors=True)
        raise
    return made


@contextlib.contextmanager
def _copied(database: Path) -> Iterator[Path]:
    """Yield a temporary copy of an SQLite database, taken as one consistent snapshot."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.db"
        with closing(sqlite3.connect(database)) as given, closing(sqlite3.connect(copy)) as taken:
            given.backup(taken)
        yield copy


def _files_of(root: Path) -> Iterator[Path]:
    for folder in FOLDERS:
        for path, folders, names in os.walk(root / folder):
            folders[:] = sorted(name for name in folders if not _LEFT_OUT.fullmatch(name))
            yield from (
                Path(path) / name
                for name in sorted(names)
                if not _LEFT_OUT.fullmatch(name) and not (Path(path) / name).is_symlink()
            )


def _add(archive: tarfile.TarFile, name: str, path: Path) -> dict[str, Any]:
    """Add a file up to its present size (other processes may be appending to it) and return its size and sha256."""
    with open(path, "rb") as stream:
        status = os.fstat(stream.fileno())
        return {"bytes": status.st_size, "sha256": _add_stream(archive, name, stream, status.st_size, status.st_mtime)}


def _add_stream(archive: tarfile.TarFile, name: str, stream: IO[bytes], size: int, modified_at: float) -> str:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, modified_at, 0o600
    reader = _Digesting(stream)
    archive.addfile(info, reader)
    return reader.digest.hexdigest()


class _Digesting:
    """A stream that computes the sha256 of the bytes that were read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest = stream, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.digest.update(data)
        return data


def _unpack(backup_file: Path, target: Path) -> tuple[Backup, dict[str, dict[str, Any]]]:
    manifest: bytes | None = None
    try:
        with tarfile.open(backup_file, "r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if not member.isreg() or path.is_absolute() or ".." in path.parts:
                    raise InvalidInput(f"{printable(backup_file)}: not a backup of a workspace ({printable(member.name)})")
                stream = archive.extractfile(member)
                assert stream is not None
                if member.name == MANIFEST:
                    manifest = stream.read()
                    continue
                place = target / path
                place.parent.mkdir(parents=True, exist_ok=True)
                with open(place, "wb") as written:
                    shutil.copyfileobj(stream, written, _CHUNK_BYTES)
                os.utime(place, (member.mtime, member.mtime))  # the time at which a model was registered is that of its files
    except tarfile.TarError as error:
        raise InvalidInput(f"{printable(backup_file)}: cannot be read as a backup ({error})") from None
    if manifest is None:
        raise InvalidInput(f"{printable(backup_file)}: has no {MANIFEST}: it was cut short, or is not a backup")
    found = json.loads(manifest)
    if found["schema_version"] != SCHEMA_VERSION:
        raise InvalidInput(
            f"{printable(backup_file)}: of schema version {found['schema_version']}, this version reads {SCHEMA_VERSION}"
        )
    files: dict[str, dict[str, Any]] = found["files"]
    size = sum(file["bytes"] for file in files.values())
    return Backup(Path(found["root"]), found["created_at"], len(files), size), files


def _check(backup_file: Path, target: Path, name: str, file: dict[str, Any]) -> None:
    with contextlib.suppress(FileNotFoundError), open(target / name, "rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() == file["sha256"]:
            return
    raise InvalidInput(f"{printable(backup_file)}: {printable(name)} is missing or not what was written; the backup is damaged")


def _move_paths(arriving: Path, before: str, after: str) -> None:
    """Replace the old workspace's path by the new one in the databases and the records of runs."""
    for name in (JOBS, MLFLOW):
        if (arriving / name).exists():
            with closing(sqlite3.connect(arriving / name)) as connection, connection:
                _move_in_database(connection, before, after)
    for path in (arriving / "runs").rglob("*"):
        if path.suffix in _WITH_PATHS and path.is_file() and path.stat().st_size <= _LARGEST_REWRITTEN_BYTES:
            text = path.read_bytes()
            moved = text
            for old, new in ((before, after), (json.dumps(before)[1:-1], json.dumps(after)[1:-1])):  # JSON may escape letters
                moved = moved.replace(os.fsencode(f"{old}/"), os.fsencode(f"{new}/"))
            if moved != text:
                path.write_bytes(moved)
    for checkpoints in list((arriving / "runs").rglob(RunDir(arriving).checkpoints.name)):
        if not RunDir(checkpoints.parent).outcome.exists():
            shutil.rmtree(checkpoints)


def _move_in_database(connection: sqlite3.Connection, before: str, after: str) -> None:
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    for table in tables:
        for _, column, kind, *_ in connection.execute(f'PRAGMA table_info("{table}")').fetchall():
            if "CHAR" in kind.upper() or "TEXT" in kind.upper():
                connection.execute(
                    f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) WHERE instr("{column}", ?)',
                    (f"{before}/", f"{after}/", f"{before}/"),
                )
