"""Opening the job database, and saying what is wrong with one that cannot be opened or written."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, func, select, text

from finetune.errors import DiskFull, InvalidInput, StoreError
from finetune.jobs import database as module
from finetune.jobs.database import DATABASE_VARIABLE, open_database, open_jobs, reading, writing
from finetune.jobs.schema import job_events, jobs, metadata
from finetune.jobs.store import JobStore

SPEC = {"training_file": "flowers"}


def queue(path: Path, count: int = 1) -> JobStore:
    store = JobStore(open_database(path))
    for _ in range(count):
        store.create("ada", SPEC, spec_digest="0" * 64)
    return store


def test_the_migrations_make_the_tables_that_the_code_expects(tmp_path: Path) -> None:
    expected = create_engine(f"sqlite:///{tmp_path / 'expected.db'}")
    metadata.create_all(expected)
    made = [_schema(engine) for engine in (expected, open_database(tmp_path / "jobs.db"))]
    assert len(made[0]) == 16, "7 tables and 9 indexes"
    assert made[1] == made[0]


def _schema(engine: Engine) -> dict[str, str]:
    query = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT IN ('alembic_version', 'sqlite_sequence')"
    with engine.connect() as connection:
        return {name: " ".join(sql.split()) for name, sql in connection.execute(text(query))}


def test_sqlite_is_opened_as_safely_as_its_version_allows(tmp_path: Path) -> None:
    engine = open_database(tmp_path / "jobs.db")
    with engine.connect() as connection:
        pragmas = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    safe_wal = sqlite3.sqlite_version_info >= (3, 51, 3)
    assert pragmas == {"journal_mode": "wal" if safe_wal else "truncate", "synchronous": 2 if safe_wal else 3, "foreign_keys": 1}


def test_other_users_cannot_read_the_secrets_in_it(tmp_path: Path) -> None:
    open_database(tmp_path / "jobs.db")
    assert (tmp_path / "jobs.db").stat().st_mode & 0o007 == 0


def test_many_may_open_a_new_database_at_once(tmp_path: Path) -> None:
    opened = []
    threads = [threading.Thread(target=lambda: opened.append(open_database(tmp_path / "jobs.db"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4


def test_the_workspaces_database_is_a_file_in_it_unless_another_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATABASE_VARIABLE, raising=False)
    assert open_jobs(tmp_path / "new" / "home").url.database == str(tmp_path / "new" / "home" / "jobs.db")
    monkeypatch.setenv(DATABASE_VARIABLE, str(tmp_path / "elsewhere.db"))
    assert open_jobs(tmp_path).url.database == str(tmp_path / "elsewhere.db")


def test_an_older_database_is_upgraded_and_keeps_its_jobs(tmp_path: Path) -> None:
    store = queue(tmp_path / "jobs.db", 2)
    claim = store.claim("worker of the older release")
    assert claim is not None
    migrations = shutil.copytree(module._MIGRATIONS, tmp_path / "migrations")
    newest = max(path.name.partition("_")[0] for path in (migrations / "versions").glob("0*.py"))
    (migrations / "versions" / "9998_next.py").write_text(
        textwrap.dedent(f"""
        import sqlalchemy as sa
        from alembic import op
        revision, down_revision = "9998", "{newest}"
        def upgrade():
            with op.batch_alter_table("jobs") as batch:
                batch.add_column(sa.Column("colour", sa.String(8), nullable=False, server_default="green"))
        """)
    )
    upgraded = open_database(tmp_path / "jobs.db", migrations)
    with reading(upgraded) as connection:
        assert connection.execute(text("SELECT count(*), min(colour) FROM jobs")).one() == (2, "green")
        assert connection.execute(select(func.count()).select_from(job_events)).scalar_one() == 3, "no cascade took them"
    assert JobStore(upgraded).heartbeat(claim) is False


def test_a_newer_database_is_refused_with_what_to_do(tmp_path: Path) -> None:
    store = queue(tmp_path / "jobs.db")
    with writing(store.engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    before = (tmp_path / "jobs.db").read_bytes()
    with pytest.raises(StoreError, match=r"jobs\.db: a newer release of finetune wrote this job database \(schema 9999\)"):
        open_database(tmp_path / "jobs.db")
    assert (tmp_path / "jobs.db").read_bytes() == before


@pytest.mark.parametrize("damage", ["text", "torn"])
def test_a_damaged_database_is_refused_with_its_path_and_how_to_recover(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "jobs.db"
    queue(path, 30).engine.dispose()
    whole = path.read_bytes()
    path.write_bytes(b"this is not a database at all" * 99 if damage == "text" else whole[:100] + b"\xff" * 8000 + whole[8100:])
    with pytest.raises(StoreError, match=r"jobs\.db: the job database is damaged .* keep it .*\.recover.*\.backup"):
        open_database(path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/home/jobs\.db: the folder of the job database cannot be made"):
        open_database(tmp_path / "file" / "home" / "jobs.db")


def test_sqlite_on_a_network_file_system_is_refused(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"root / ext4 rw 0 0\nserver:/x {tmp_path}/a\\040b nfs4 rw 0 0\ntmp {tmp_path}/a\\040b/local tmpfs rw 0 0\n"
    )
    place = tmp_path / "a b"
    assert module._network_file_system(place / "home", mounts) == "nfs4"
    assert module._network_file_system(place / "local" / "home", mounts) is None
    assert module._network_file_system(tmp_path, mounts) is None


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("postgresql+psycopg//typo://", "is not a database URL"),
        ("mysql+pymysql://localhost/x", "not in mysql"),
    ],
)
def test_a_url_that_jobs_cannot_be_kept_at_is_refused(url: str, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        open_database(url)


def test_a_postgresql_that_does_not_answer_is_named_without_its_password() -> None:
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:1/jobs") as caught:
        open_database("postgresql://ada:secret@127.0.0.1:1/jobs")
    assert "secret" not in caught.value.message


def test_a_full_disk_is_said_to_be_full_and_loses_nothing(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow: SQLite then gets the error of a full disk."""
    queue(tmp_path / "jobs.db", 3).engine.dispose()
    script = textwrap.dedent("""
        import resource, signal, sys
        from pathlib import Path
        from finetune.errors import DiskFull, StoreError
        from finetune.jobs.database import open_database
        from finetune.jobs.store import JobStore
        path = Path(sys.argv[1])
        store = JobStore(open_database(path))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, resource.RLIM_INFINITY))
        try:
            while True:
                store.create("ada", {"note": "x" * 5000}, spec_digest="0" * 64)
        except (DiskFull, StoreError) as error:
            sys.stdout.write(type(error).__name__ + " " + str(store.counts()["queued"]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        store.create("ada", {"note": "there is space again"}, spec_digest="0" * 64)
    """)
    said = subprocess.run([sys.executable, "-c", script, tmp_path / "jobs.db"], capture_output=True, text=True, check=True)
    kind, before = said.stdout.split()
    assert kind in ("DiskFull", "StoreError")
    with reading(open_database(tmp_path / "jobs.db")) as connection:
        assert connection.execute(text("PRAGMA integrity_check")).scalar_one() == "ok"
        assert connection.execute(select(func.count()).select_from(jobs)).scalar_one() == int(before) + 1


def test_the_databases_own_words_for_a_full_disk_become_ours() -> None:
    for words in ("database or disk is full", "could not extend file: No space left on device"):
        assert isinstance(module._named("place", words), DiskFull)
    assert "held the job database for 30 seconds" in module._named("place", "database is locked").message


@pytest.mark.parametrize("name", ["My%20Drive", "what?mode=ro", "a#b", "100 %", "naïve"])
def test_a_workspace_may_have_any_name(tmp_path: Path, name: str) -> None:
    open_database(tmp_path / name / "jobs.db").dispose()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "jobs.db").stat().st_size > 0
