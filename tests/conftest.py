"""Fixtures shared by every tier."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["leftover_processes"]

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def photos() -> Path:
    """A folder of real labelled photographs with ``train/`` and ``validation/`` inside; not part of the repository."""
    folder = Path(os.environ.get("FINETUNE_TEST_PHOTOS", REPOSITORY.parent / "shared" / "data" / "clothing"))
    if not (folder / "train").is_dir():
        pytest.skip(f"needs real photographs: set FINETUNE_TEST_PHOTOS (looked in {folder})")
    return folder


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database. Its migrations take seconds, so they run once a session and tests copy the file."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


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
