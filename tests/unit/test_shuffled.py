"""The plugin that runs the tests in the order of a seed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shuffled import in_order_of

ITEMS: list[Any] = [
    SimpleNamespace(path=Path(f"test_{file}.py"), name=f"{file}{number}") for file in "abcdefgh" for number in range(6)
]


def names(seed: int) -> list[str]:
    return [item.name for item in in_order_of(seed, ITEMS)]


def test_every_test_runs_once_and_the_tests_of_a_file_one_after_another() -> None:
    found = names(1)
    assert sorted(found) == [item.name for item in ITEMS]
    files = [found[start : start + 6] for start in range(0, len(found), 6)]
    assert all(len({name[0] for name in file}) == 1 for file in files)
    assert [file[0][0] for file in files] != list("abcdefgh"), "files change places"
    assert any(file != sorted(file) for file in files), "so do the tests of a file"


def test_a_seed_gives_the_same_order_in_every_process_and_another_seed_another() -> None:
    """A process of pytest-xdist refuses to run tests in another order than the others."""
    assert names(7) == names(7)
    assert names(7) != names(8)
