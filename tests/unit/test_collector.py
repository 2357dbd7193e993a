"""The collector is out of the way where it is told to be, and back afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from finetune.runtime.collector import collection_paused, objects_exempt


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Free what the tests exempt, and exempt everything again as `conftest` did."""
    yield
    gc.unfreeze()
    gc.freeze()


class Knot:
    """Garbage that only the collector can find."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("paused", [objects_exempt, collection_paused])
def test_the_collector_rests_inside_and_works_afterwards(paused: Callable[[], AbstractContextManager[None]]) -> None:
    assert gc.isenabled()
    with paused():
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize("paused", [objects_exempt, collection_paused])
def test_the_collector_works_after_a_failure_too(paused: Callable[[], AbstractContextManager[None]]) -> None:
    with pytest.raises(ZeroDivisionError), paused():
        raise ZeroDivisionError
    assert gc.isenabled()


@pytest.mark.parametrize("paused", [objects_exempt, collection_paused])
def test_a_collector_that_was_off_stays_off(paused: Callable[[], AbstractContextManager[None]]) -> None:
    gc.disable()
    try:
        with paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_is_put_off_is_found_later() -> None:
    with collection_paused():
        knot = weakref.ref(Knot())
    assert knot() is not None
    gc.collect()
    assert knot() is None


def test_what_is_said_to_stay_is_not_looked_at_again() -> None:
    with objects_exempt():
        knot = weakref.ref(Knot())
    gc.collect()
    assert knot() is not None
    gc.unfreeze()
    gc.collect()
    assert knot() is None
