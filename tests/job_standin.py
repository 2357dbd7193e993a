"""Jobs whose training is the stand-in (`training_standin`): submitting them, driving workers, reading what happened.

``python job_standin.py WORKSPACE SETTINGS`` is a worker for such jobs, for tests that kill it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import is_running
from sqlalchemy import update
from training_standin import next_state

from finetune.executors.executor import Executor, Handle
from finetune.executors.local import LocalExecutor
from finetune.jobs.database import open_database, writing
from finetune.jobs.job import Job
from finetune.jobs.kinds import TRAINING, Kind
from finetune.jobs.schema import HELD, jobs
from finetune.jobs.store import JobStore
from finetune.jobs.worker import Worker, WorkerSettings
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir

LEASE_SECONDS = 60.0  # no test waits for its end (see `end_leases`), and a busy machine does not reach it
DEADLINE_SECONDS = 240.0  # on a busy machine; a test that passes waits for none of it
QUICK = {
    "heartbeat_seconds": 0.2, "retry_base_seconds": 0.05, "threads": 1, "cancel_grace_seconds": 5.0, "stall_seconds": 60.0,
    "min_free_bytes": 0,
}  # fmt: skip


class StandinExecutor(LocalExecutor):
    """Starts the stand-in wherever the worker asks for ``finetune train`` or ``finetune compare``."""

    def start(self, job_id: str, command: Sequence[str], **given: Any) -> Handle:
        return super().start(job_id, standin_for(command), **given)


def standin_for(command: Sequence[str]) -> list[str]:
    assert list(command[1:3]) == ["-m", "finetune"], command
    return [command[0], str(Path(__file__).with_name("training_standin.py")), *command[3:]]


def submit(store: JobStore, *, steps: int = 3, owner: str = "ada", kind: Kind = TRAINING, **behaviour: Any) -> Job:
    """Queue a job of `steps` steps; for `behaviour` see `training_standin.carry_out`."""
    metadata = {key: json.dumps(value) for key, value in {"steps": steps, **behaviour}.items()}
    spec = {"model": {"backbone": "standin"}, "method": {"type": "full"}, "training_file": "none", "metadata": metadata}
    job, _ = store.create(owner, spec, kind=kind, spec_digest="0" * 64)
    return job


def worker(store: JobStore, home: Path, **settings: Any) -> Worker:
    return Worker(store, StandinExecutor(), home, WorkerSettings(**{**QUICK, **settings}))


def drive(*workers: Worker, until: Callable[[], Any]) -> None:
    """Let the workers work in turn until the condition holds."""
    wait(lambda: [one.step() for one in workers] and until())


def wait(condition: Callable[[], Any], seconds: float = DEADLINE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} seconds"
        time.sleep(0.01)


def end_of(executor: Executor, handle: Handle) -> int:
    """Wait for an attempt; how it ended."""
    codes: list[int | None] = []
    wait(lambda: codes.append(executor.poll(handle)) or codes[-1] is not None)
    assert codes[-1] is not None
    return codes[-1]


def is_gone(pid: int) -> bool:
    return not is_running(pid)


def end_leases(store: JobStore) -> None:
    """Let the leases of all jobs that workers hold run out at once, as the time would that no test waits for."""
    with writing(store.engine) as connection:
        connection.execute(update(jobs).where(jobs.c.state.in_(HELD)).values(lease_until=0.0))


def result_of(steps: int) -> str:
    """What a run of so many steps comes to: every step depends on all before it, so a lost or a repeated one shows."""
    state = ""
    for step in range(steps):
        state = next_state(state, step)
    return state


@dataclass(frozen=True)
class Trace:
    """What the stand-in's processes left of one job, read from ``trace.jsonl`` in its run folder."""

    starts: list[int] = field(default_factory=list)  # the step that each attempt began at
    overlaps: int = 0  # times that one process found another alive in the same run
    completions: int = 0
    environments: list[dict[str, str | None]] = field(default_factory=list)  # of each attempt

    @staticmethod
    def of(run: RunDir) -> Trace:
        lines = read_lines(run.root / "trace.jsonl")
        return Trace(
            [line["step"] for line in lines if line["what"] == "start"],
            sum(line["what"] == "overlap" for line in lines),
            sum(line["what"] == "complete" for line in lines),
            [line["environment"] for line in lines if line["what"] == "start"],
        )


def work(home: Path, settings: Mapping[str, Any]) -> None:
    """A worker for stand-in jobs, until it is told to stop. `settings` may also give ``lease_seconds`` and ``database``."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(message)s")
    given = dict(settings)
    store = JobStore(
        open_database(given.pop("database", home / "jobs.db")), lease_seconds=given.pop("lease_seconds", LEASE_SECONDS)
    )
    worker(store, home, **given).run()


if __name__ == "__main__":
    workspace_folder, worker_settings = sys.argv[1:]
    work(Path(workspace_folder), json.loads(worker_settings))
