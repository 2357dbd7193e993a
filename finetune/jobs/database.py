"""Open the job database: SQLite in its own file by default, PostgreSQL by URL; upgrade its schema to the newest version.

SQLite uses a rollback journal and full synchronisation, since a race in the write-ahead log of versions before 3.51.3 can lose
commits with two open connections. A writing transaction begins with BEGIN IMMEDIATE, so that two claims cannot both read before
either writes. Failures of the database (damaged, full, unreachable) are raised as `FinetuneError`s.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, make_url, text

from finetune.distribution import install_command
from finetune.errors import DiskFull, FinetuneError, InvalidInput, MissingExtra, StoreError

DATABASE_VARIABLE = "FINETUNE_DATABASE"

_MIGRATIONS = Path(__file__).parent / "migrations"
_WAL_IS_SAFE = sqlite3.sqlite_version_info >= (3, 51, 3)
_BUSY_SECONDS = 30
_CONNECTIONS = 40  # the number of the server's threads, so that none waits for a connection
_UPGRADE_LOCK = 0x66696E65  # arbitrary number of the advisory lock for upgrades of a PostgreSQL database
_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "ceph", "glusterfs", "lustre", "beegfs", "sshfs")

_one_upgrade = threading.Lock()  # Alembic's context is a global variable


def open_jobs(home: Path) -> Engine:
    """Open the job database of a workspace: ``FINETUNE_DATABASE`` (a URL or a path), else ``jobs.db`` in the workspace."""
    return open_database(os.environ.get(DATABASE_VARIABLE) or home / "jobs.db")


def open_database(where: str | Path, migrations: Path = _MIGRATIONS) -> Engine:
    """Open the job database at a file path or a SQLAlchemy URL; create or upgrade it if necessary.

    Raises:
        StoreError: the database is damaged, was upgraded by a newer release, or is unreachable.
        DiskFull: there is no space to create or upgrade it.
        InvalidInput: the URL is malformed or of an unsupported database.
    """
    engine = _engine(where)
    try:
        with _one_upgrade:
            _upgrade(engine, migrations)
    except FinetuneError:
        engine.dispose()
        raise
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Yield a connection in a read-only transaction, which sees one consistent snapshot."""
    with _failures_named(engine), engine.connect() as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Yield a connection in a transaction that commits at the end of the block; SQLite takes its write lock at the beginning."""
    with (
        _failures_named(engine),
        engine.connect().execution_options(begin_immediate=True) as connection,
        connection.begin(),
    ):
        yield connection


def _engine(where: str | Path) -> Engine:
    url: str | URL = where if isinstance(where, str) and "://" in where else _sqlite_url(Path(where))
    if isinstance(url, str) and url.startswith(("postgresql://", "postgres://")):
        url = f"postgresql+psycopg://{url.partition('://')[2]}"
    try:
        kind = make_url(url).get_backend_name()
    except exc.ArgumentError:
        raise InvalidInput(
            f"{DATABASE_VARIABLE}={url!r} is not a database URL. Give a file path or postgresql://user:password@host/database"
        ) from None
    if kind not in ("sqlite", "postgresql"):
        raise InvalidInput(f"{DATABASE_VARIABLE}: jobs are kept in SQLite (a file path) or PostgreSQL, not in {kind}")
    try:
        engine = create_engine(url, pool_size=_CONNECTIONS, max_overflow=0, pool_pre_ping=kind != "sqlite")
    except ModuleNotFoundError as error:
        raise MissingExtra(f"a PostgreSQL job database needs {error.name}: {install_command('postgres')}") from None
    if engine.dialect.name == "sqlite":
        _prepare_sqlite(engine)
    return engine


def _sqlite_url(path: Path) -> URL:
    """Return the URL of a database file. Built from parts, because a path may contain characters with a meaning in URLs."""
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{path}: the folder of the job database cannot be made: {error.strerror}") from error
    with contextlib.suppress(OSError):  # it is there, or cannot be made, which SQLite reports
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o660))  # not for others: it has webhooks' secrets
    if kind := _network_file_system(path.parent):
        raise StoreError(
            f"{path}: this folder is on {kind}, and SQLite's locks are not safe over a network. Choose a local folder"
            f" (FINETUNE_HOME), or keep the jobs in PostgreSQL ({DATABASE_VARIABLE}=postgresql://…)."
        )
    return URL.create("sqlite", database=str(path))


def _network_file_system(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str | None:
    """Return the kind of network file system that `folder` is on, or None if it is local."""
    if not mounts.exists():
        return None
    best, kind = "", ""
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, point, found, *_ = line.split(" ")
        point = point.encode().decode("unicode_escape")  # a space in a mount point is escaped as \040
        if folder.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind if any(name in kind for name in _NETWORK_FILE_SYSTEMS) else None


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver's implicit deferred BEGIN would fail with "locked" instead of waiting
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {_BUSY_SECONDS * 1000}")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute(f"PRAGMA journal_mode = {'WAL' if _WAL_IS_SAFE else 'TRUNCATE'}")
        cursor.execute(f"PRAGMA synchronous = {'FULL' if _WAL_IS_SAFE else 'EXTRA'}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("begin_immediate", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _upgrade(engine: Engine, migrations: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _UPGRADE_LOCK})
        present = MigrationContext.configure(connection).get_current_revision()
        if present == scripts.get_current_head():
            return
        if present is not None and present not in {script.revision for script in scripts.walk_revisions()}:
            raise StoreError(
                f"{_place(engine)}: a newer release of finetune wrote this job database (schema {present}). Install that release,"
                " or give this one a database of its own: another FINETUNE_HOME."
            )
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise StoreError(f"{_place(engine)}: the job database cannot be upgraded: {error}") from error


@contextmanager
def _failures_named(engine: Engine) -> Iterator[None]:
    """Convert failures of the database itself into `FinetuneError`s; programming errors pass through."""
    try:
        yield
    except exc.TimeoutError as error:
        raise StoreError(f"{_place(engine)}: every connection to the job database is in use; try again") from error
    except exc.DatabaseError as error:
        if isinstance(error, exc.IntegrityError | exc.ProgrammingError | exc.DataError | exc.NotSupportedError):
            raise
        raise _named(_place(engine), str(error.orig).partition("\n")[0]) from error


def _named(place: str, cause: str) -> FinetuneError:
    lowered = cause.lower()
    if "disk is full" in lowered or "no space left" in lowered:
        return DiskFull(f"{place}: the disk is full; the job database is as it was before. Free some space and try again.")
    if any(sign in lowered for sign in ("malformed", "not a database", "file is encrypted")):
        return StoreError(
            f"{place}: the job database is damaged ({cause}). Move the file away, but keep it (sqlite3 FILE .recover often saves"
            " most of it), and put your last copy in its place (sqlite3 FILE '.backup COPY' makes one)."
        )
    if "locked" in lowered:
        return StoreError(f"{place}: another process has held the job database for {_BUSY_SECONDS} seconds; try again")
    return StoreError(f"{place}: the job database cannot be used: {cause}")


def _place(engine: Engine) -> str:
    """Return the path of the database's file, or its URL without the password."""
    if engine.dialect.name == "sqlite":
        return str(engine.url.database)
    return engine.url.render_as_string(hide_password=True)
