"""The worker against real processes, whose training is a stand-in: every way in which an attempt can end, and in which it can."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from job_standin import DEADLINE_SECONDS, LEASE_SECONDS, Trace, drive, end_leases, is_gone, result_of, submit, wait, worker
from processes import children_of

from finetune.errors import InvalidInput, StoreError
from finetune.jobs import worker as worker_module
from finetune.jobs.clock import LeaseTime, machine_time
from finetune.jobs.database import open_database
from finetune.jobs.job import Job
from finetune.jobs.kinds import COMPARISON
from finetune.jobs.lease import write_lease
from finetune.jobs.store import JobStore
from finetune.jobs.worker import WorkerSettings
from finetune.runtime.device import visible_gpus
from finetune.storage.files import write_json
from finetune.storage.rundir import RunDir

CRASHING = Path(__file__).parents[1] / "crashing"
FOR_EVER = {"steps": 100_000, "step_seconds": 0.02}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def store(home: Path) -> JobStore:
    return JobStore(open_database(home / "jobs.db"), lease_seconds=LEASE_SECONDS)


def run_of(home: Path, job: Job) -> RunDir:
    return RunDir(home / "runs" / job.id)


def kinds(store: JobStore, job: Job) -> list[str]:
    return [event.kind for event in store.events(job.id)]


def finished(store: JobStore, *jobs: Job) -> Callable[[], bool]:
    return lambda: all(store.get(job.id).finished for job in jobs)


def started(home: Path, job: Job, attempts: int = 1) -> Callable[[], bool]:
    """So many attempts have begun, and the last has made a checkpoint."""
    run = run_of(home, job)
    return lambda: (
        len(Trace.of(run).starts) >= attempts and len(list(run.checkpoints.glob("*.sha256"))) > max(Trace.of(run).starts)
    )


@contextmanager
def worker_process(home: Path, *, stop_at: str | None = None, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a process of its own, for killing; `stop_at` names a point at which it stops itself (`tests/crashing`)."""
    script = Path(__file__).parents[1] / "job_standin.py"
    environment = dict(os.environ)
    if stop_at is not None:
        environment |= {"PYTHONPATH": os.pathsep.join([str(CRASHING), os.environ.get("PYTHONPATH", "")]), "CRASH_AT": stop_at}
        environment |= {"CRASH_SIGNAL": "SIGSTOP", "CRASH_MARK": str(home / "stopped")}
    with open(home / "worker.log", "ab") as log:
        command = [sys.executable, script, home, json.dumps(settings)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def child_of(process: subprocess.Popen[bytes]) -> int:
    (child,) = children_of(process.pid)
    return child


# ── how attempts end ──────────────────────────────────────────────────────────────────────────────


def test_a_job_is_run_to_its_end_and_its_result_and_history_are_kept(store: JobStore, home: Path) -> None:
    job = submit(store, steps=3)
    drive(worker(store, home), until=finished(store, job))
    done, run = store.get(job.id), run_of(home, job)
    assert (done.state, done.attempts, done.phase) == ("succeeded", 1, None)
    assert done.result == {"model": "standin", "version": "1", "metrics": {"val/top1": 1.0}, "state": result_of(3)}
    assert kinds(store, job) == ["queued", "running", "planned", "succeeded"]
    assert store.events(job.id)[-1].message == "standin version 1 is registered."
    assert not list(run.root.glob("lease-*"))
    assert Trace.of(run).environments[0]["FINETUNE_HOME"] == str(home)


def test_a_job_that_takes_more_memory_than_allowed_fails_and_says_so_and_the_next_one_is_run(
    store: JobStore, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_MEMORY_CHECK_SECONDS", 0.0)
    greedy = submit(store, steps=20, hoard_bytes=50 << 20, hang_at=19)  # with 1,000 MiB it waits to be ended
    modest = submit(store, steps=3)
    drive(worker(store, home, max_memory_bytes=600 << 20), until=finished(store, greedy, modest))
    ended = store.get(greedy.id)
    assert (ended.state, ended.error_code, ended.attempts) == ("failed", "out_of_memory", 1)
    assert re.match(
        r"The run took [\d.]+ MiB of memory; its worker allows 600\.0 MiB a job\. Try a smaller", str(ended.error_message)
    )
    assert store.get(modest.id).state == "succeeded"


def test_a_comparison_is_a_command_of_its_own_and_ends_with_its_verdict(store: JobStore, home: Path) -> None:
    job = submit(store, steps=3, kind=COMPARISON)
    drive(worker(store, home), until=finished(store, job))
    done = store.get(job.id)
    assert (done.id.partition("-")[0], done.state, done.result and done.result["state"]) == ("ftcmp", "succeeded", result_of(3))
    assert store.events(job.id)[-1].message == "both are equal."


@pytest.mark.longer
def test_a_comparison_that_dies_after_each_run_is_no_crash_loop_because_finished_runs_are_kept(
    store: JobStore, home: Path
) -> None:
    job = submit(store, steps=6, kind=COMPARISON, die_once_at={str(step): -signal.SIGKILL for step in range(1, 6)})
    drive(worker(store, home), until=finished(store, job))
    done = store.get(job.id)
    assert (done.state, done.attempts, done.result and done.result["state"]) == ("succeeded", 6, result_of(6))
    assert Trace.of(run_of(home, job)).starts == [0, 1, 2, 3, 4, 5]


def test_a_run_that_dies_goes_on_from_its_newest_checkpoint(store: JobStore, home: Path) -> None:
    job = submit(store, steps=6, die_once_at={"2": -signal.SIGKILL, "3": -signal.SIGSEGV, "4": 3})
    drive(worker(store, home), until=finished(store, job))
    done, trace = store.get(job.id), Trace.of(run_of(home, job))
    assert (done.state, done.attempts, done.result and done.result["state"]) == ("succeeded", 4, result_of(6))
    assert (trace.starts, trace.completions, trace.overlaps) == ([0, 2, 3, 4], 1, 0)
    assert kinds(store, job).count("requeued") == 3


def test_a_run_that_gets_nowhere_three_times_is_a_crash_loop_and_its_last_words_are_kept(store: JobStore, home: Path) -> None:
    job = submit(store, steps=3, die_at={"1": -signal.SIGSEGV}, noisy=20)
    drive(worker(store, home), until=finished(store, job))
    failed = store.get(job.id)
    assert (failed.state, failed.error_code, failed.attempts) == ("failed", "crash_loop", 4)  # the first one made a checkpoint
    assert "SIGSEGV" in str(failed.error_message)
    assert str(failed.error_message).endswith("line 17\nline 18\nline 19")


def test_an_error_that_the_run_explains_fails_the_job_at_once(store: JobStore, home: Path) -> None:
    problem = {"where": "training_file", "message": "no class folder"}
    error = {"code": "invalid_data", "message": "the data cannot be trained on", "problems": [problem]}
    job = submit(store, steps=0, error=error, exit_code=2)
    drive(worker(store, home), until=finished(store, job))
    failed = store.get(job.id)
    assert (failed.state, failed.error_code, failed.attempts) == ("failed", "invalid_data", 1)
    assert failed.error_message == "the data cannot be trained on\ntraining_file: no class folder"


def test_a_full_disk_puts_the_job_back_until_there_is_space(store: JobStore, home: Path) -> None:
    job = submit(store, steps=0, error={"code": "disk_full", "message": "the disk is full", "problems": []})
    drive(worker(store, home), until=lambda: "requeued" in kinds(store, job))
    assert store.get(job.id).state == "queued"
    assert store.events(job.id)[-1].data == {"delay_seconds": 60.0}


def test_nothing_is_started_while_the_disk_is_almost_full(store: JobStore, home: Path) -> None:
    job = submit(store)
    one = worker(store, home, min_free_bytes=10**18)
    for _ in range(3):
        one.step()
    assert store.get(job.id).state == "queued"


def test_a_run_that_cannot_be_started_is_put_back(store: JobStore, home: Path) -> None:
    (home / "runs").write_text("a file where the folder of runs should be")
    job = submit(store)
    drive(worker(store, home), until=lambda: "requeued" in kinds(store, job))
    assert "could not be started" in store.events(job.id)[-1].message
    (home / "runs").unlink()


@pytest.mark.parametrize("stopped_from_outside", [False, True])
def test_a_run_that_hangs_is_ended_and_tried_again(store: JobStore, home: Path, stopped_from_outside: bool) -> None:
    job = submit(store, **(FOR_EVER if stopped_from_outside else {"steps": 3, "hang_at": 2}))
    one = worker(store, home, heartbeat_seconds=0.1)
    drive(one, until=started(home, job))
    one.settings = dataclasses.replace(one.settings, stall_seconds=0.4)  # not before: a busy machine is slow to start it
    if stopped_from_outside:
        (attempt,) = one._attempts.values()
        os.kill(int(attempt.handle.reference), signal.SIGSTOP)
    drive(one, until=lambda: "requeued" in kinds(store, job))
    (requeued,) = (event for event in store.events(job.id) if event.kind == "requeued")
    assert "no progress" in requeued.message
    store.request_cancel(job.id)
    drive(one, until=finished(store, job))


def test_a_folder_that_another_process_works_in_is_waited_for(store: JobStore, home: Path) -> None:
    job = submit(store)
    with run_of(home, job).held():
        drive(worker(store, home), until=lambda: "requeued" in kinds(store, job))
    assert store.events(job.id)[-1].data == {"delay_seconds": 5.0}
    assert Trace.of(run_of(home, job)).starts == []


def test_a_run_that_was_complete_before_its_worker_could_say_so_is_only_committed(store: JobStore, home: Path) -> None:
    job = submit(store, steps=2)
    run = run_of(home, job).create()
    write_json(run.outcome, {"model": "standin", "version": "7"})
    drive(worker(store, home), until=finished(store, job))
    assert store.get(job.id).result == {"model": "standin", "version": "7"}
    assert Trace.of(run).starts == []


# ── cancelling ────────────────────────────────────────────────────────────────────────────────────


def test_a_running_job_is_cancelled_after_it_wrote_its_checkpoint(store: JobStore, home: Path) -> None:
    job = submit(store, **FOR_EVER)
    one = worker(store, home)
    drive(one, until=started(home, job))
    store.request_cancel(job.id)
    drive(one, until=finished(store, job))
    assert store.get(job.id).state == "cancelled"
    assert sorted(kinds(store, job)) == ["cancelled", "cancelling", "planned", "queued", "running"]
    assert kinds(store, job)[-1] == "cancelled"
    assert not one._attempts


def test_a_run_that_will_not_stop_is_killed_after_its_grace(store: JobStore, home: Path) -> None:
    job = submit(store, deaf=True, **FOR_EVER)
    one = worker(store, home, cancel_grace_seconds=0.3)
    drive(one, until=started(home, job))
    store.request_cancel(job.id)
    drive(one, until=finished(store, job))
    assert store.get(job.id).state == "cancelled"


# ── slots and devices ─────────────────────────────────────────────────────────────────────────────


def test_as_many_jobs_run_at_once_as_there_are_slots_each_on_a_gpu_of_its_own(store: JobStore, home: Path) -> None:
    jobs = [submit(store, **FOR_EVER) for _ in range(3)]
    one = worker(store, home, slots=2, gpus=(4, 7), threads=6)
    drive(one, until=lambda: all(started(home, job)() for job in jobs[:2]))
    assert [store.get(job.id).state for job in jobs] == ["running", "running", "queued"]
    environments = [Trace.of(run_of(home, job)).environments[0] for job in jobs[:2]]
    assert sorted(str(seen["CUDA_VISIBLE_DEVICES"]) for seen in environments) == ["4", "7"]
    assert {seen["OMP_NUM_THREADS"] for seen in environments} == {"3"}
    store.request_cancel(jobs[0].id)
    drive(one, until=started(home, jobs[2]))
    freed = str(environments[0]["CUDA_VISIBLE_DEVICES"])
    assert Trace.of(run_of(home, jobs[2])).environments[0]["CUDA_VISIBLE_DEVICES"] == freed
    for job in jobs[1:]:
        store.request_cancel(job.id)
    drive(one, until=finished(store, *jobs))


def test_more_slots_than_gpus_are_refused() -> None:
    with pytest.raises(InvalidInput, match="slots 3: there are 2 GPUs"):
        WorkerSettings(slots=3, gpus=(0, 1))
    with pytest.raises(InvalidInput, match="at least one job"):
        WorkerSettings(slots=0)


def test_the_gpus_to_use_are_those_that_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(tmp_path) == (0, 2, 10)
    for given, expected in [("3,1", (3, 1)), ("", ()), ("-1", ())]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert visible_gpus(tmp_path) == expected


# ── when the ground shakes ────────────────────────────────────────────────────────────────────────


def test_a_database_that_fails_for_a_while_costs_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JobStore(open_database(home / "jobs.db"), lease_seconds=60)  # longer than what follows
    jobs = [submit(store, steps=30, step_seconds=0.02) for _ in range(2)]
    one = worker(store, home, heartbeat_seconds=0.1)
    drive(one, until=started(home, jobs[0]))
    failures = 0

    def failing(*_: object, **__: object) -> None:
        nonlocal failures
        failures += 1
        raise StoreError("the job database cannot be used: disk I/O error")

    with monkeypatch.context() as broken:
        for name in ("heartbeat", "claim", "reap", "finish", "cancel_requested", "attempts_without_progress", "requeue"):
            broken.setattr(store, name, failing)
        drive(one, until=lambda: failures >= 5 and run_of(home, jobs[0]).outcome.exists())
    drive(one, until=finished(store, *jobs))
    assert [store.get(job.id).state for job in jobs] == ["succeeded", "succeeded"]
    assert [Trace.of(run_of(home, job)).completions for job in jobs] == [1, 1]


def test_a_run_folder_that_vanishes_does_not_take_the_worker_along(store: JobStore, home: Path) -> None:
    vanishing, other = submit(store, steps=20, step_seconds=0.05), submit(store, steps=2)
    one = worker(store, home)
    drive(one, until=started(home, vanishing))
    shutil.rmtree(run_of(home, vanishing).root, ignore_errors=True)
    drive(one, until=finished(store, vanishing, other))
    assert [store.get(job.id).state for job in (vanishing, other)] == ["succeeded", "succeeded"]


def test_a_worker_that_lost_its_job_ends_the_process_and_writes_nothing(store: JobStore, home: Path) -> None:
    job = submit(store, **FOR_EVER)
    first = worker(store, home, name="first")
    drive(first, until=started(home, job))
    (attempt,) = first._attempts.values()
    end_leases(store)  # nobody renews meanwhile: `first` is not driven
    assert store.reap() == [job.id]
    taken = store.claim("second")
    assert taken is not None
    before = store.events(job.id)
    drive(first, until=lambda: not first._attempts)
    assert is_gone(int(attempt.handle.reference))
    assert store.events(job.id) == before
    assert store.get(job.id).worker == "second"
    store.finish(taken, "cancelled")


# ── workers that are killed, stopped, or told to stop ─────────────────────────────────────────────


@pytest.mark.longer
def test_a_killed_worker_takes_its_run_along_and_another_resumes_it(store: JobStore, home: Path) -> None:
    job = submit(store, steps=60, hang_once_at=30)
    with worker_process(home) as first:
        wait((run_of(home, job).root / "hung-at-30").exists)
        child = child_of(first)
        first.kill()
        wait(lambda: is_gone(child))
    end_leases(store)
    drive(worker(store, home), until=finished(store, job))
    done, trace = store.get(job.id), Trace.of(run_of(home, job))
    assert (done.state, done.result and done.result["state"], done.attempts) == ("succeeded", result_of(60), 2)
    assert (trace.starts, trace.completions, trace.overlaps) == ([0, 30], 1, 0)
    assert kinds(store, job).count("worker_lost") == 1


def test_a_worker_that_is_stopped_past_its_lease_writes_nothing_when_it_wakes(store: JobStore, home: Path) -> None:
    job = submit(store, steps=40, hang_once_at=20)
    # Between two transactions: a process that is stopped inside one keeps the database locked for everybody.
    point = "after commit jobs.db in JobStore.heartbeat once runs/*/checkpoints/*.sha256"
    with worker_process(home, stop_at=point, name="sleeper") as sleeper:
        wait((home / "stopped").exists)
        wait((run_of(home, job).root / "hung-at-20").exists)
        child = child_of(sleeper)
        (lease,) = run_of(home, job).root.glob("lease-*")
        write_lease(lease, LeaseTime(machine_time().seconds - LEASE_SECONDS, machine_time().epoch), LEASE_SECONDS)
        wait(lambda: is_gone(child))  # the process of the stopped worker ends with its lease
        end_leases(store)
        second = worker(store, home, name="second")
        drive(second, until=started(home, job, attempts=2))
        sleeper.send_signal(signal.SIGCONT)
        drive(second, until=finished(store, job))
        wait(lambda: "the lease is lost" in (home / "worker.log").read_text())
    done, trace = store.get(job.id), Trace.of(run_of(home, job))
    assert (done.state, done.result and done.result["state"]) == ("succeeded", result_of(40))
    assert (trace.starts, trace.completions, trace.overlaps) == ([0, 20], 1, 0)
    assert [event.data["worker"] for event in store.events(job.id) if event.kind == "running"] == ["sleeper", "second"]
    assert kinds(store, job).count("succeeded") == 1


@pytest.mark.parametrize("deaf", [False, True])
def test_a_worker_that_is_told_to_stop_hands_its_jobs_back_at_once(store: JobStore, home: Path, deaf: bool) -> None:
    job = submit(store, deaf=deaf, **FOR_EVER)
    with worker_process(home, cancel_grace_seconds=0.3 if deaf else 30.0) as process:
        wait(started(home, job))
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_SECONDS) == 0
    queued = store.get(job.id)
    assert (queued.state, queued.attempts, queued.worker) == ("queued", 1, None)
    again = store.claim("next")
    assert again is not None, "it does not wait for a lease to end"
    assert store.attempts_without_progress(again) == (1, 1), "the attempt was not counted"


def test_a_second_signal_hurries_a_worker_that_waits_for_its_run(store: JobStore, home: Path) -> None:
    job = submit(store, deaf=True, **FOR_EVER)
    with worker_process(home, cancel_grace_seconds=1000.0) as process:
        wait(started(home, job))
        process.send_signal(signal.SIGTERM)
        wait(lambda: "jobs are returned to the queue" in (home / "worker.log").read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_SECONDS) == 0
    assert store.get(job.id).state == "queued"


@pytest.mark.longer
def test_a_worker_that_cannot_hand_its_jobs_back_stops_all_the_same(home: Path) -> None:
    lease_seconds = 3.0  # for so long it tries
    job = submit(JobStore(open_database(home / "jobs.db")), **FOR_EVER)
    with worker_process(home, lease_seconds=lease_seconds, cancel_grace_seconds=0.1) as process:
        wait(started(home, job))
        (home / "jobs.db").unlink()
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_SECONDS) == 0
    assert f"{job.id} could not be returned to the queue" in (home / "worker.log").read_text()


def test_the_kernels_count_of_memory_kills_is_read(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("pgfault 12\noom_kill 3\nnr_free 1\n")
    assert worker_module._memory_kills(tmp_path / "vmstat") == 3
    assert worker_module._memory_kills(tmp_path / "absent") == 0
