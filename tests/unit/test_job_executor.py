"""Attempts as child processes: how they start, end, and die with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from job_standin import end_of, is_gone, wait

from finetune.executors.executor import Handle, Resources
from finetune.executors.local import LocalExecutor

SLEEPS = "import time; time.sleep(600)"


@pytest.fixture
def executor() -> Iterator[LocalExecutor]:
    executor = LocalExecutor()
    yield executor
    for reference in list(executor._children):
        handle = Handle("", reference)
        executor.cancel(handle, grace_seconds=0)
        wait(lambda handle=handle: executor.poll(handle) is not None)


def start(executor: LocalExecutor, log: Path, script: str, resources: Resources | None = None) -> Handle:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return executor.start("job", command, fence=1, environment={"COLOUR": "green"}, log=log, resources=resources or Resources())


@pytest.mark.parametrize(
    ("script", "code"),
    [("", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9), ("import os; os.abort()", -signal.SIGABRT)],
)
def test_the_exit_code_or_the_signal_is_told(executor: LocalExecutor, tmp_path: Path, script: str, code: int) -> None:
    assert end_of(executor, start(executor, tmp_path / "log", script)) == code


def test_an_attempt_sees_its_resources_and_its_environment_and_appends_to_its_log(
    executor: LocalExecutor, tmp_path: Path
) -> None:
    log = tmp_path / "run" / "log.txt"
    log.parent.mkdir()
    log.write_text("an earlier attempt\n")
    script = """
        import os, sys
        sys.stdout.write(" ".join(os.environ[name] for name in ("COLOUR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")))
        sys.stdout.flush()
        sys.stderr.write(f" {os.getsid(0) == os.getpid()} {sys.stdin.read()!r}")
    """
    assert end_of(executor, start(executor, log, script, Resources(3, (1, 0)))) == 0
    assert log.read_text() == "an earlier attempt\ngreen 3 1,0 True ''"


def test_an_attempt_that_is_told_to_stop_may_end_by_itself(executor: LocalExecutor, tmp_path: Path) -> None:
    script = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
        sys.stdout.write("ready"); sys.stdout.flush()
        time.sleep(600)
    """
    handle = start(executor, tmp_path / "log", script)
    wait(lambda: (tmp_path / "log").read_text() == "ready")
    executor.cancel(handle, grace_seconds=600)
    executor.cancel(handle, grace_seconds=600)
    assert end_of(executor, handle) == 130


def test_an_attempt_that_does_not_stop_is_killed_after_the_shortest_grace(executor: LocalExecutor, tmp_path: Path) -> None:
    script = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.stdout.write("ready"); sys.stdout.flush()
        time.sleep(600)
    """
    handle = start(executor, tmp_path / "log", script)
    wait(lambda: (tmp_path / "log").read_text() == "ready")
    executor.cancel(handle, grace_seconds=600)
    assert executor.poll(handle) is None
    executor.cancel(handle, grace_seconds=0)
    assert end_of(executor, handle) == -signal.SIGKILL


def test_what_an_attempt_started_ends_with_it(executor: LocalExecutor, tmp_path: Path) -> None:
    script = f"""
        import subprocess, sys
        grandchild = subprocess.Popen([sys.executable, "-c", {SLEEPS!r}])
        sys.stdout.write(str(grandchild.pid))
    """
    handle = start(executor, tmp_path / "log", script)
    assert end_of(executor, handle) == 0
    grandchild = int((tmp_path / "log").read_text())
    wait(lambda: is_gone(grandchild))


def test_an_attempt_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = f"""
        import sys, time
        from pathlib import Path
        from finetune.executors.executor import Resources
        from finetune.executors.local import LocalExecutor
        command = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"]
        log = Path({str(tmp_path / "log")!r})
        handle = LocalExecutor().start("job", command, fence=1, environment={{}}, log=log, resources=Resources())
        sys.stdout.write(handle.reference); sys.stdout.flush()
        time.sleep(600)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(os.read(parent.stdout.fileno(), 20))
    cmdline = Path(f"/proc/{child}/cmdline")
    wait(lambda: b"process_parent" not in cmdline.read_bytes())  # it has become the command
    assert not is_gone(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait(lambda: is_gone(child))


def test_a_process_whose_parent_is_gone_already_starts_nothing() -> None:
    started = subprocess.run(
        [*(sys.executable, "-m", "finetune.executors.process_parent", "1"), sys.executable, "-c", "print('started')"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (started.returncode, started.stdout) == (os.EX_TEMPFAIL, "")


def test_attempts_are_started_from_the_main_thread_only(executor: LocalExecutor, tmp_path: Path) -> None:
    raised: list[RuntimeError] = []

    def elsewhere() -> None:
        with pytest.raises(RuntimeError, match="main thread") as caught:
            start(executor, tmp_path / "log", SLEEPS)
        raised.append(caught.value)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(raised) == 1
