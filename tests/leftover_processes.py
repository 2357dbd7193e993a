"""A pytest plugin: a test that leaves a process behind fails, and the process is killed.

Every process that a test starts, directly or not, inherits an environment variable that names this pytest process, so it is found
again also when its parent has died, when it has moved to a session of its own, and when the test failed. Processes that a fixture
of a wider scope started belong to that fixture until it has been finalised. Linux only, as the product's workers are.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from processes import all_processes, command_line, environment_of, is_running, lineage, parent_of

VARIABLE = "FINETUNE_TESTS_RUN"
TAG = f"{VARIABLE}={uuid.uuid4().hex}".encode()
GRACE_SECONDS = 60.0  # a process that was told to stop may still be stopping, on a machine that is busy
# Python's own helper lives as long as the pytest process that needed it first; Chromium's crash handlers leave its process group
# and are started some time after the browser, which they live as long as: whether the browser is left is looked at.
EXEMPT = (b"from multiprocessing.resource_tracker import main", b"chrome_crashpad_handler")


@dataclass
class Processes:
    """The processes that this pytest process has started, and which of them belong to a fixture."""

    of_fixtures: dict[Any, set[int]] = field(default_factory=dict)
    elsewhere: set[int] = field(default_factory=all_processes)  # what ran before has nothing to do with the tests

    def alive(self) -> set[int]:
        """Return the ids of all living processes that were started from here."""
        return {pid for pid in all_processes() - self.elsewhere if self._is_ours(pid) and is_running(pid)}

    def left_over(self) -> set[int]:
        """Return those that no fixture is responsible for."""
        kept = set().union(*self.of_fixtures.values())
        return {pid for pid in self.alive() if not kept & lineage(pid)}

    def _is_ours(self, pid: int) -> bool:
        """A fork that became no other program still shows the environment that this process began with: its parent tells."""
        if parent_of(pid) != os.getpid():
            environment = environment_of(pid)
            if not environment:
                self.elsewhere.add(pid)
            if TAG not in environment.split(b"\0"):
                return False
        return not any(mark in command_line(pid) for mark in EXEMPT)


# ── the plugin ────────────────────────────────────────────────────────────────────────────────────

PROCESSES = Processes()


def pytest_configure(config: pytest.Config) -> None:
    name, _, value = TAG.decode().partition("=")
    os.environ[name] = value


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
    if fixturedef.scope == "function":
        return (yield)
    before = PROCESSES.alive()
    try:
        return (yield)
    finally:
        PROCESSES.of_fixtures[fixturedef] = PROCESSES.alive() - before


def pytest_fixture_post_finalizer(fixturedef: pytest.FixtureDef[Any]) -> None:
    PROCESSES.of_fixtures.pop(fixturedef, None)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    result = yield
    if commands := end_left_over(GRACE_SECONDS):
        pytest.fail(f"{item.nodeid} left processes behind, which were killed:\n" + "\n".join(commands), pytrace=False)
    return result


def pytest_sessionfinish() -> None:
    """Leave nothing behind when the session is interrupted either."""
    PROCESSES.of_fixtures.clear()
    if not os.environ.get("PYTEST_XDIST_TESTRUNUID") or os.environ.get("PYTEST_XDIST_WORKER"):
        end_left_over(0)


def end_left_over(grace_seconds: float) -> list[str]:
    """Wait for left-over processes to end, kill those that do not, and return their commands."""
    deadline = time.monotonic() + grace_seconds
    while left := PROCESSES.left_over():
        if time.monotonic() >= deadline:
            break
        time.sleep(0.02)
    commands = []
    for pid in sorted(left):
        commands.append(f"  {pid}: {command_line(pid).decode(errors='replace')[:300]}")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while grace_seconds and PROCESSES.left_over() & left and time.monotonic() < deadline + GRACE_SECONDS:
        time.sleep(0.02)
    return commands
