"""Fixtures shared by every tier."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from made_once import made_once, shared_folder

pytest_plugins = ["buckets", "leftover_processes", "screens", "shuffled"]

REPOSITORY = Path(__file__).resolve().parents[1]


SERVICE_MARKERS = ("postgresql", "ray")
SERVICE_TESTS = frozenset({"test_file_store.py", "test_job_keys.py", "test_job_store.py", "test_ray_executor.py"})
"""The files with tests of those markers. They import nothing that only training needs, so their environment is small."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--services", action="store_true", help="run the tests of PostgreSQL and Ray alone; one that is skipped fails"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let Hypothesis try the same examples in every run, however long one takes: a test fails for what was changed.

    ``pytest --hypothesis-profile=default`` looks for others.
    """
    if config.pluginmanager.hasplugin("hypothesispytest") and config.getoption("--hypothesis-profile") is None:
        from hypothesis import settings

        settings.load_profile("ci")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    other = collection_path.name == "browser" or (
        collection_path.name.startswith("test_") and collection_path.name not in SERVICE_TESTS
    )
    return True if config.getoption("services") and other else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if any(item.get_closest_marker(name) for name in SERVICE_MARKERS)]
    if unlisted := {item.path.name for item in marked} - SERVICE_TESTS:
        raise pytest.UsageError(f"tests of {' or '.join(SERVICE_MARKERS)} in a file that conftest.py does not list: {unlisted}")
    if config.getoption("services"):
        config.hook.pytest_deselected(items=[item for item in items if item not in marked])
        items[:] = marked


def pytest_collection_finish() -> None:
    """Exempt what importing the tests has made from garbage collections: a million objects, which stay to the end."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("services"):
        report.outcome, report.longrepr = "failed", f"skipped where a skip is a failure: {report.longrepr}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _own_network_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep traced networks of the tests, and of the processes that they start, out of the user's cache folder.

    The worker processes of one test session share them: any number of processes may use one folder.
    """
    before = os.environ.get("FINETUNE_CACHE")
    os.environ["FINETUNE_CACHE"] = str(shared_folder(tmp_path_factory) / "networks-of-the-session")
    yield
    if before is None:
        del os.environ["FINETUNE_CACHE"]
    else:
        os.environ["FINETUNE_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def _no_tracker_unless_asked_for() -> Iterator[None]:
    """Do not mirror the runs of tests in MLflow, whose first database takes seconds; tests of tracking say what they want."""
    os.environ["FINETUNE_TRACKERS"] = "none"
    yield
    del os.environ["FINETUNE_TRACKERS"]


@pytest.fixture(scope="session")
def photos() -> Path:
    """A folder of real labelled photographs with ``train/`` and ``validation/`` inside; not part of the repository."""
    folder = Path(os.environ.get("FINETUNE_TEST_PHOTOS", REPOSITORY.parent / "shared" / "data" / "clothing"))
    if not (folder / "train").is_dir():
        pytest.skip(f"needs real photographs: set FINETUNE_TEST_PHOTOS (looked in {folder})")
    return folder


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, to be copied: its migrations take seconds."""
    import mlflow

    def migrate(folder: Path) -> None:
        mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments(max_results=1)

    return made_once(tmp_path_factory, "mlflow", migrate) / "mlflow.db"


@pytest.fixture
def mlflow_workspace(mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace folder whose MLflow database is ready to use."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    shutil.copy(mlflow_database, workspace / "mlflow.db")
    return workspace


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Small networks are quicker on one thread, and tests that share a machine do not slow each other down."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unmeasured_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `finetune check` leave out the forecast of the whole job, for which a child process would measure the backbone."""
    monkeypatch.setattr("finetune.runs.known_speeds.measure_in_child", lambda question: None)
