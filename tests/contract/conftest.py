"""The databases that the job store promises to work on. Each test of a `database` runs on every one of them."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from made_once import made_once
from postgres import PostgresMissing, running_postgres
from sqlalchemy import Engine, text

from finetune.data import intake
from finetune.jobs.database import open_database
from finetune.jobs.schema import metadata
from finetune.spec import parse_spec
from finetune.storage.workspace import Workspace
from service import spec_check
from service.child import ChildProgram
from service.spec_check import SpecChecker


@pytest.fixture(scope="session", autouse=True)
def _patient_check_of_names() -> Iterator[None]:
    """Wait long for the process that knows the training libraries: on a busy machine its imports alone may take a minute."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spec_check, "SECONDS", 240)
        yield


@pytest.fixture(scope="session")
def tell_backbones(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], object]:
    """Return a function that lets servers of a workspace know the names of timm's backbones, as if they had been asked before.

    They are listed in this process: importing timm in another one takes seconds.
    """

    def list_them(folder: Path) -> None:
        from finetune.model.catalog import all_names

        def answer(_: ChildProgram, given: Mapping[str, list[object]], what: str) -> dict[str, object]:
            return {"problems": [[] for _ in given["specs"]], "catalogue": all_names()}

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ChildProgram, "run", answer)
            asyncio.run(SpecChecker(folder).check([parse_spec({"training_file": "unused"})], "tests"))

    listed = made_once(tmp_path_factory, "backbones-of-timm", list_them)
    return lambda home: shutil.copytree(listed, Workspace.at(home).cache / "notes", dirs_exist_ok=True)


@pytest.fixture
def known_backbones(tell_backbones: Callable[[Path], object], tmp_path: Path) -> None:
    """Let a server whose workspace is `tmp_path` know the names of timm's backbones."""
    tell_backbones(tmp_path)


@pytest.fixture
def uploads_read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a server in this process read uploads itself instead of starting a process for each.

    For tests of what comes after an upload; those of uploads themselves do without it.
    """
    monkeypatch.setattr(intake, "_run_child", lambda request, limits, what: json.loads(json.dumps(intake.answer_to(request))))


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
