"""Attempts on a Ray cluster: a real one on this machine, started for the tests where Ray is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from job_standin import QUICK, Trace, drive, end_of, is_gone, result_of, standin_for, submit, wait

from finetune.distribution import install_command
from finetune.errors import ExecutorError, MissingExtra
from finetune.executors.executor import Handle, Resources
from finetune.executors.ray_cluster import RayExecutor, exit_code, shell_line
from finetune.jobs.database import open_database
from finetune.jobs.store import JobStore
from finetune.jobs.worker import Worker, WorkerSettings
from finetune.storage.rundir import RunDir

RAY_IS_HERE = importlib.util.find_spec("ray") is not None


def needs_ray(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.ray(pytest.mark.skipif(not RAY_IS_HERE, reason=f"needs Ray: {install_command('ray')}")(test))


STOP_SECONDS = 4.0
CLUSTER = """
    import sys, ray
    context = ray.init(num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1", log_to_driver=False)
    print("http://" + context.dashboard_url, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard of a cluster of this machine alone."""
    log = tmp_path_factory.mktemp("ray") / "log"
    with (
        open(log, "wb") as stream,
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CLUSTER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},  # it listens on this machine alone, and not for long
        ) as cluster,  # it ends when its stdin is closed, at the end of the block
    ):
        assert cluster.stdout is not None
        lines = (line.strip() for line in cluster.stdout)
        url = next((line for line in lines if line.startswith("http://")), None)
        assert url, log.read_text()
        yield url


@pytest.fixture
def executor(address: str) -> RayExecutor:
    return RayExecutor(address, STOP_SECONDS)


def start(executor: RayExecutor, log: Path, script: str, fence: int = 1, threads: int = 1) -> Handle:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    # Ray keeps every id that it was ever given
    return executor.start(
        f"ftjob-{log.parent}".replace("/", "-"), command, fence=fence, environment={"COLOUR": "green"}, log=log,
        resources=Resources(threads),
    )  # fmt: skip


def pid_in(path: Path) -> Callable[[], int]:
    return lambda: int(path.read_text() or 0) if path.exists() else 0


# ── without a cluster ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "code", "began", "expected"),
    [
        ("SUCCEEDED", 0, True, 0),
        ("FAILED", 3, True, 3),
        ("FAILED", -11, True, -signal.SIGSEGV),
        ("FAILED", None, True, -signal.SIGKILL),
        ("FAILED", None, False, os.EX_TEMPFAIL),
        ("STOPPED", None, True, -signal.SIGTERM),
    ],
)
def test_how_ray_says_an_attempt_ended_becomes_an_exit_code(status: str, code: int | None, began: bool, expected: int) -> None:
    assert exit_code(status, code, began=began) == expected


def test_the_command_takes_the_shells_place_and_its_words_stay_words(tmp_path: Path) -> None:
    log = tmp_path / "a run's folder" / "log.txt"
    log.parent.mkdir()
    line = shell_line([sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "two words", "$HOME; 'x"], log)
    assert subprocess.run(line, shell=True, check=False).returncode == 7
    assert log.read_text() == """['two words', "$HOME; 'x"]\n"""
    killed = subprocess.run(
        shell_line([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], log), shell=True, check=False
    )
    assert killed.returncode == -9


def test_a_machine_without_the_workspace_says_so_and_is_not_the_jobs_fault(tmp_path: Path) -> None:
    line = shell_line(["true"], tmp_path / "nowhere" / "log.txt")
    ran = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert ran.returncode == os.EX_TEMPFAIL
    assert ran.stderr == f"{tmp_path}/nowhere is not on this machine: the workspace must be on a disk that all machines share\n"


@pytest.mark.skipif(RAY_IS_HERE, reason="Ray is installed")
def test_ray_that_is_not_installed_is_named_with_its_extra() -> None:
    with pytest.raises(MissingExtra, match=re.escape(install_command("ray"))):
        RayExecutor("http://127.0.0.1:1", STOP_SECONDS)


# ── with one ──────────────────────────────────────────────────────────────────────────────────────


@needs_ray
def test_an_address_where_no_cluster_answers_is_named() -> None:
    with pytest.raises(ExecutorError, match=r"Ray at http://127\.0\.0\.1:1 cannot be used"):
        RayExecutor("http://127.0.0.1:1", STOP_SECONDS)


@needs_ray
def test_an_attempt_sees_its_resources_and_its_environment_and_its_end_is_told(executor: RayExecutor, tmp_path: Path) -> None:
    log = tmp_path / "run" / "log.txt"
    script = "import os; print(os.environ['COLOUR'], os.environ['OMP_NUM_THREADS']); {}"
    assert end_of(executor, start(executor, log, script.format("raise SystemExit(3)"))) == 3
    assert end_of(executor, start(executor, log, script.format("os.kill(os.getpid(), 9)"), fence=2, threads=2)) == -9
    assert end_of(executor, start(executor, log, script.format("pass"), fence=3)) == 0
    assert [line for line in log.read_text().splitlines() if line.startswith("green")] == ["green 1", "green 2", "green 1"]


@needs_ray
def test_the_same_claim_submitted_twice_runs_once(executor: RayExecutor, tmp_path: Path) -> None:
    log = tmp_path / "run" / "log.txt"
    first = start(executor, log, "print('started')")
    again = start(executor, log, "print('started')")
    assert again == first
    assert end_of(executor, first) == 0
    assert log.read_text().count("started") == 1


@needs_ray
def test_an_attempt_that_is_told_to_stop_ends_by_itself_and_so_does_what_it_started(
    executor: RayExecutor, tmp_path: Path
) -> None:
    log, said, child = tmp_path / "run" / "log.txt", tmp_path / "said", tmp_path / "child"
    script = f"""
        import pathlib, signal, subprocess, sys, time
        deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
        started = subprocess.Popen([sys.executable, "-c", deaf])
        def stop(*_):
            pathlib.Path({str(said)!r}).write_text("checkpoint")
            sys.exit(130)
        signal.signal(signal.SIGTERM, stop)
        pathlib.Path({str(child)!r}).write_text(str(started.pid))
        time.sleep(600)
    """
    handle = start(executor, log, script)
    wait(pid_in(child))
    executor.cancel(handle, grace_seconds=STOP_SECONDS)
    assert end_of(executor, handle) == -signal.SIGTERM
    assert said.read_text() == "checkpoint"
    wait(lambda: is_gone(pid_in(child)()))


@needs_ray
def test_an_attempt_that_does_not_stop_is_killed(executor: RayExecutor, tmp_path: Path) -> None:
    log, own = tmp_path / "run" / "log.txt", tmp_path / "pid"
    script = f"""
        import os, pathlib, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pathlib.Path({str(own)!r}).write_text(str(os.getpid()))
        time.sleep(600)
    """
    handle = start(executor, log, script)
    wait(pid_in(own))
    executor.cancel(handle, grace_seconds=0)
    assert end_of(executor, handle) == -signal.SIGTERM
    wait(lambda: is_gone(pid_in(own)()))


class StandinOnRay(RayExecutor):
    """Starts the stand-in wherever the worker asks for ``finetune train``."""

    def start(self, job_id: str, command: Sequence[str], **given: Any) -> Handle:
        return super().start(job_id, standin_for(command), **given)


@needs_ray
def test_a_worker_runs_resumes_and_cancels_jobs_on_a_cluster(address: str, tmp_path: Path) -> None:
    store = JobStore(open_database(tmp_path / "jobs.db"))
    dying = submit(store, steps=4, die_once_at={"2": -signal.SIGKILL})
    endless = submit(store, steps=100_000, step_seconds=0.02)
    one = Worker(store, StandinOnRay(address, STOP_SECONDS), tmp_path, WorkerSettings(**{**QUICK, "slots": 2, "threads": 2}))
    trace = RunDir(tmp_path / "runs" / endless.id)
    drive(one, until=lambda: Trace.of(trace).starts and list(trace.checkpoints.glob("*.sha256")))
    store.request_cancel(endless.id)
    drive(one, until=lambda: store.get(dying.id).finished and store.get(endless.id).finished)
    done = store.get(dying.id)
    assert (done.state, done.attempts, done.result and done.result["state"]) == ("succeeded", 2, result_of(4))
    assert Trace.of(RunDir(tmp_path / "runs" / dying.id)).starts == [0, 2]
    assert store.get(endless.id).state == "cancelled"
