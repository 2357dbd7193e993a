"""What takes seconds to make and never changes is made once for all processes of a test session, and tests copy it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(folders: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that `make` has filled, in the process of pytest-xdist that asked first."""
    folder = shared_folder(folders) / name
    folder.mkdir(exist_ok=True)
    with open(folder.with_suffix(".lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready = folder.with_suffix(".ready")
        if not ready.exists():
            make(folder)
            ready.touch()
    return folder


def shared_folder(folders: pytest.TempPathFactory) -> Path:
    """Return a temporary folder that all processes of this test session have in common."""
    own = folders.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
