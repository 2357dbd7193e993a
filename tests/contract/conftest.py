"""The databases that the job store promises to work on. Each test of a `database` runs on every one of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres import PostgresMissing, running_postgres
from sqlalchemy import Engine, text

from finetune.jobs.database import open_database
from finetune.jobs.schema import metadata
from service import spec_check


@pytest.fixture(scope="session", autouse=True)
def _patient_check_of_names() -> Iterator[None]:
    """Wait long for the process that knows the training libraries: on a busy machine its imports alone may take a minute."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spec_check, "SECONDS", 240)
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of an empty PostgreSQL database."""
    try:
        with running_postgres() as url:
            yield url
    except PostgresMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    """Where an empty job database is: a path or a URL, for as many engines and processes as a test wants."""
    if request.param == "sqlite":
        return tmp_path / "jobs.db"
    url: str = request.getfixturevalue("postgres")
    engine = open_database(url)
    with engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {', '.join(table.name for table in metadata.sorted_tables)} RESTART IDENTITY CASCADE"))
    engine.dispose()
    return url


@pytest.fixture
def engine(database: str | Path) -> Iterator[Engine]:
    engine = open_database(database)
    yield engine
    engine.dispose()
