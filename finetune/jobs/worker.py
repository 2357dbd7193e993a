"""The worker: claims queued jobs, runs one process for each attempt, and keeps the database true to what the runs do.

The run writes files, the worker writes the database, HTTP reads the database. A worker that dies takes its children with it, its
leases run out, and whichever worker reaps them resumes the runs from their newest checkpoints. Knows nothing of training.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.jobs.executor import Executor, Handle, Resources
from finetune.jobs.lease import LEASE_VARIABLE, write_lease
from finetune.jobs.store import Claim, JobStore, LeaseLost
from finetune.rundir import RunDir, read_json, read_lines, write_atomic

log = logging.getLogger(__name__)

EXIT_OK, EXIT_BAD_INPUT, EXIT_BUSY, EXIT_INTERRUPTED = 0, 2, os.EX_TEMPFAIL, 130
MAX_STALLED_ATTEMPTS = 3  # attempts in a row without a new checkpoint, after which the job is a crash loop
_RETRY_LATER_SECONDS = {"disk_full": 60.0, "out_of_memory": 10.0}


@dataclass(frozen=True)
class WorkerSettings:
    """`slots` attempts run at once, each with `threads` CPU threads; intervals are seconds."""

    name: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    slots: int = 1
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    gpus: tuple[int, ...] = ()
    beat_seconds: float = 5.0
    cancel_grace_seconds: float = 20.0
    stall_seconds: float = 1800.0
    retry_base_seconds: float = 2.0


@dataclass
class _Attempt:
    claim: Claim
    run: RunDir
    handle: Handle
    lease_file: Path  # one for each claim: a worker that lost the job must not touch its successor's
    gpus: tuple[int, ...]
    checkpoints_before: frozenset[str]
    beat_at: float = 0.0
    moved_at: float = field(default_factory=time.monotonic)  # when the run last showed progress
    progress: Mapping[str, Any] | None = None
    cancelling: bool = False
    stalled: bool = False

    @property
    def progressed(self) -> bool:
        return bool(_checkpoints(self.run) - self.checkpoints_before)


class Worker:
    """Call `run` from the main thread: children are bound to the thread that starts them."""

    def __init__(
        self,
        store: JobStore,
        executor: Executor,
        home: Path,
        settings: WorkerSettings,
        *,
        on_success: Callable[[Claim, Mapping[str, Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        self.store = store
        self.executor = executor
        self.home = home
        self.settings = settings
        self.on_success = on_success
        self._attempts: dict[str, _Attempt] = {}
        self._stopping = False

    def run(self, *, until_idle: bool = False) -> None:
        """Work until SIGTERM or SIGINT (then hand every job back at once), or `until_idle`: until there is nothing left to do."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        while not self._stopping:
            worked = self.step()
            if until_idle and not worked and not self.store.counts().keys() & {"queued", "running", "cancelling"}:
                return
            time.sleep(0.05 if worked else 0.5)
        self._hand_everything_back()

    def step(self) -> bool:
        """Look at every attempt once and start what there is a slot for; whether anything was running or was started."""
        self.store.reap()
        for attempt in list(self._attempts.values()):
            try:
                self._attend(attempt)
            except LeaseLost:
                self._abandon(attempt)
        while len(self._attempts) < self.settings.slots and (claim := self.store.claim(self.settings.name)) is not None:
            self._begin(claim)
        return bool(self._attempts)

    def _stop(self, _number: int, _frame: Any) -> None:
        self._stopping = True

    def _begin(self, claim: Claim) -> None:
        run = RunDir(self.home / "runs" / claim.job.id).create()
        spec_file, lease_file = run.root / "request.yaml", run.root / f"lease-{claim.fence}.json"
        write_atomic(spec_file, lambda stream: stream.write(yaml.safe_dump(dict(claim.job.spec), allow_unicode=True).encode()))
        write_lease(lease_file, self.store.lease_seconds)
        run.error.unlink(missing_ok=True)
        gpus = self._free_gpu()
        handle = self.executor.start(
            claim.job.id,
            [sys.executable, "-m", "finetune", "train", str(spec_file), "--run-dir", str(run.root), "--json"],
            environment={"FINETUNE_HOME": str(self.home), LEASE_VARIABLE: str(lease_file)},
            log=run.root / "log.txt",
            resources=Resources(max(1, self.settings.threads // self.settings.slots), gpus),
        )
        self._attempts[claim.job.id] = _Attempt(claim, run, handle, lease_file, gpus, _checkpoints(run))

    def _free_gpu(self) -> tuple[int, ...]:
        taken = {gpu for attempt in self._attempts.values() for gpu in attempt.gpus}
        return tuple(gpu for gpu in self.settings.gpus if gpu not in taken)[:1]

    def _attend(self, attempt: _Attempt) -> None:
        code = self.executor.poll(attempt.handle)
        now = time.monotonic()
        if code is not None:
            self._forward(attempt)
            self._settle(attempt, code)
            attempt.lease_file.unlink(missing_ok=True)
            del self._attempts[attempt.claim.job.id]
        elif now - attempt.beat_at >= self.settings.beat_seconds:
            attempt.beat_at = now
            self._forward(attempt)
            write_lease(attempt.lease_file, self.store.lease_seconds)
            if now - attempt.moved_at > self.settings.stall_seconds:
                attempt.stalled = True
                self.executor.cancel(attempt.handle, grace_seconds=0)
        elif not attempt.cancelling and self.store.cancel_requested(attempt.claim):
            attempt.cancelling = True
            self.executor.cancel(attempt.handle, grace_seconds=self.settings.cancel_grace_seconds)

    def _forward(self, attempt: _Attempt) -> None:
        """Publish what the run wrote since the last look."""
        progress = read_json(attempt.run.progress) if attempt.run.progress.exists() else None
        if progress != attempt.progress:
            attempt.progress, attempt.moved_at = progress, time.monotonic()
        phase = None if progress is None else str(progress["phase"])
        self.store.heartbeat(attempt.claim, phase=phase, progress=progress)
        self.store.forward_events(attempt.claim, read_lines(attempt.run.events))

    def _settle(self, attempt: _Attempt, code: int) -> None:
        """The attempt has ended with `code`: end the job, or queue it again."""
        store, claim = self.store, attempt.claim
        if code == EXIT_OK and attempt.run.outcome.exists():
            result = read_json(attempt.run.outcome)
            store.finish(claim, "succeeded", result=self.on_success(claim, result) if self.on_success else result)
            return
        if attempt.cancelling or store.cancel_requested(claim):
            store.finish(claim, "cancelled")
            return
        error = _read_error(attempt.run)
        if error is not None and code == EXIT_BAD_INPUT:
            store.finish(claim, "failed", error_code=error["code"], error_message=error["message"])
        elif code == EXIT_BUSY:
            store.hand_back(claim, "Another process still holds the run's folder; trying again shortly.", delay_seconds=5.0)
        elif code == EXIT_INTERRUPTED:
            store.hand_back(claim, "The run was interrupted after it wrote a checkpoint.", progressed=attempt.progressed)
        elif error is not None and error["code"] not in _RETRY_LATER_SECONDS:
            store.finish(claim, "failed", error_code=error["code"], error_message=error["message"])
        else:
            self._retry(attempt, code, error)

    def _retry(self, attempt: _Attempt, code: int, error: Mapping[str, Any] | None) -> None:
        """A death that another attempt may cure: try again later, but not for ever when no attempt gets anywhere."""
        stalled = 0 if attempt.progressed else self.store.stalled_attempts(attempt.claim) + 1
        what = _what_happened(attempt, code, error)
        if stalled >= MAX_STALLED_ATTEMPTS or (stalled >= 2 and error is not None and error["code"] == "out_of_memory"):
            times = f"It happened {stalled} times in a row without a new checkpoint."
            message = f"{what} {times} Last lines of the log:\n{_tail(attempt.run)}"
            error_code = error["code"] if error is not None else ("stalled" if attempt.stalled else "crash_loop")
            self.store.finish(attempt.claim, "failed", error_code=error_code, error_message=message)
            return
        delay = _RETRY_LATER_SECONDS.get(error["code"], 0.0) if error is not None else 0.0
        delay = max(delay, self.settings.retry_base_seconds * 2 ** max(stalled - 1, 0))
        self.store.hand_back(attempt.claim, f"{what} Trying again.", delay_seconds=delay, progressed=attempt.progressed)

    def _abandon(self, attempt: _Attempt) -> None:
        """The job belongs to somebody else: end the process and write nothing."""
        log.warning("%s: the lease is lost; stopping its process", attempt.claim.job.id)
        attempt.lease_file.unlink(missing_ok=True)
        self.executor.cancel(attempt.handle, grace_seconds=0)
        while self.executor.poll(attempt.handle) is None:
            time.sleep(0.02)
        del self._attempts[attempt.claim.job.id]

    def _hand_everything_back(self) -> None:
        """A graceful stop: every run writes a checkpoint and its job is free for another worker at once."""
        for attempt in self._attempts.values():
            self.executor.cancel(attempt.handle, grace_seconds=self.settings.cancel_grace_seconds)
        while self._attempts:
            for attempt in list(self._attempts.values()):
                try:
                    self._attend(attempt)
                except LeaseLost:
                    self._abandon(attempt)
            time.sleep(0.05)


def _checkpoints(run: RunDir) -> frozenset[str]:
    return frozenset(path.name for path in run.checkpoints.glob("*")) if run.checkpoints.exists() else frozenset()


def _read_error(run: RunDir) -> Mapping[str, Any] | None:
    error: Mapping[str, Any] | None = read_json(run.error) if run.error.exists() else None
    return error


def _what_happened(attempt: _Attempt, code: int, error: Mapping[str, Any] | None) -> str:
    if error is not None:
        return f"The run failed: {error['message']}"
    if attempt.stalled:
        return "The run showed no progress for too long and was stopped."
    if code == -signal.SIGKILL:
        return "The run was killed (signal 9), most often because memory ran out."
    if code < 0:
        return f"The run died of signal {-code} ({signal.Signals(-code).name})."
    return f"The run ended with exit code {code}."


def _tail(run: RunDir, lines: int = 8) -> str:
    path = run.root / "log.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return "\n".join(text.splitlines()[-lines:]) or "(empty)"
