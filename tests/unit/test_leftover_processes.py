"""The plugin that keeps tests from leaving processes behind, tried on a test session of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import is_running

pytest_plugins = ["pytester"]

SLEEP = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True).pid"


@pytest.fixture(autouse=True)
def tests_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


def run(pytester: pytest.Pytester, tests: str) -> pytest.RunResult:
    pytester.makepyfile(
        f"""
        import os, pathlib, subprocess, sys, pytest

        def sleeper(name):
            pathlib.Path(name).write_text(str({SLEEP}))

        {tests.strip()}
        """
    )
    pytester.makeconftest("import leftover_processes\nleftover_processes.GRACE_SECONDS = 0.1\n")
    return pytester.runpytest_subprocess("--disable-plugin-autoload", "-p", "leftover_processes", "-p", "no:cacheprovider")


def gone(pytester: pytest.Pytester, name: str) -> bool:
    return not is_running(int((pytester.path / name).read_text()))


def test_a_test_that_leaves_a_process_behind_fails_and_the_process_is_killed(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        def test_leaves_one():
            sleeper("left")

        def test_that_follows():
            pass
        """,
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*test_leaves_one left processes behind, which were killed:*", "*time.sleep(600)*"])
    assert gone(pytester, "left")


def test_a_failing_test_leaves_nothing_behind_either_even_an_orphan(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        def test_fails():
            child = os.fork()
            if child == 0:
                sleeper("left")
                os._exit(0)
            os.waitpid(child, 0)
            assert False
        """,
    )
    result.assert_outcomes(failed=1, errors=1)
    assert gone(pytester, "left")


def test_what_a_wider_fixture_started_is_its_own_until_it_is_finalised(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        @pytest.fixture(scope="module")
        def forgetful():
            sleeper("left")

        @pytest.fixture(scope="module")
        def tidy():
            process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            yield process
            process.kill()
            process.wait()

        def test_one(forgetful, tidy):
            assert tidy.poll() is None

        def test_two(forgetful, tidy):
            assert tidy.poll() is None
        """,
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*test_two left processes behind, which were killed:*"])
    assert gone(pytester, "left")
