"""Fixtures shared by every tier."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def photos() -> Path:
    """A folder of real labelled photographs with ``train/`` and ``validation/`` inside; not part of the repository."""
    folder = Path(os.environ.get("FINETUNE_TEST_PHOTOS", REPOSITORY.parent / "shared" / "data" / "clothing"))
    if not (folder / "train").is_dir():
        pytest.skip(f"needs real photographs: set FINETUNE_TEST_PHOTOS (looked in {folder})")
    return folder
