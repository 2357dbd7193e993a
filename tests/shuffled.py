"""A pytest plugin: ``--shuffle SEED`` runs the tests in another order, which is the same in every run with that seed.

Files change places, and so do the tests of one file. A file's tests stay together, so that what they share is made once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in the order of this seed")


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.getoption("shuffle")
    return None if seed is None else f"order of the tests: --shuffle {seed}"


@pytest.hookimpl(tryfirst=True)  # pytest then puts tests together that share a parametrised fixture of a wider scope
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (seed := config.getoption("shuffle")) is not None:
        items[:] = in_order_of(seed, items)


def in_order_of(seed: int, items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return the tests in the order of a seed, file by file. Every process of pytest-xdist gets the same."""
    files: dict[object, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    chance = random.Random(seed)
    groups = list(files.values())
    chance.shuffle(groups)
    for group in groups:
        chance.shuffle(group)
    return [item for group in groups for item in group]
