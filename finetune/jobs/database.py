"""Opening the job database: SQLite in its own file by default, PostgreSQL by URL, brought to the newest schema on opening.

SQLite runs with a rollback journal and full synchronisation: below 3.51.3 a race in the write-ahead log can lose commits when two
connections are open. A writing transaction begins with BEGIN IMMEDIATE, so that two claims cannot both read before either writes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, exc

from finetune.errors import StoreError

_WAL_IS_SAFE = sqlite3.sqlite_version_info >= (3, 51, 3)
_BUSY_SECONDS = 30


def open_database(where: str | Path) -> Engine:
    """Open (and where needed create or upgrade) the job database at a file path or a SQLAlchemy URL.

    Raises:
        StoreError: the database is damaged, of a newer release, or cannot be reached.
    """
    url = where if isinstance(where, str) and "://" in where else _sqlite_url(Path(where))
    if url.startswith("postgresql://"):
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    if engine.dialect.name == "sqlite":
        _prepare_sqlite(engine)
    try:
        _upgrade(engine)
    except (exc.DatabaseError, CommandError) as error:
        engine.dispose()
        place = engine.url.render_as_string(hide_password=True)
        raise StoreError(
            f"{place}: the job database cannot be used ({_cause(error)}). If a newer release wrote it, install that release;"
            " if it is damaged, move the file away (keep it: it can often be recovered) and restore your last copy."
        ) from error
    return engine


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that holds the write lock from its first statement (SQLite) and commits at the end of the block."""
    with engine.connect().execution_options(begin_immediate=True) as connection, connection.begin():
        yield connection


def _sqlite_url(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path.absolute()}"


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver's own deferred BEGIN would fail with "locked" instead of waiting
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


def _upgrade(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    newest = ScriptDirectory.from_config(config).get_current_head()
    with writing(engine) as connection:
        present = MigrationContext.configure(connection).get_current_revision()
        if present == newest:
            return
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _cause(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
