"""The worker: claims queued jobs, runs one process for each attempt, and updates the database from the runs' files.

The run writes files, the worker writes the database, HTTP reads the database. When a worker dies, its child processes end too and
its leases expire; another worker then returns the jobs to the queue, and their runs resume from their newest checkpoints.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.bundle.access import Access, Visibility
from finetune.bundle.registry import Registry
from finetune.errors import DiskFull, ExecutorError, InvalidInput, StoreError
from finetune.executors.endings import Ending, Finish, next_action
from finetune.executors.executor import Executor, Handle, Resources
from finetune.jobs.clock import LeaseTime, machine_time
from finetune.jobs.files import FileStore
from finetune.jobs.job import LOCAL_OWNER, Claim, Job, LeaseLost
from finetune.jobs.kinds import KINDS
from finetune.jobs.lease import LEASE_VARIABLE, write_lease
from finetune.jobs.schema import UNFINISHED
from finetune.jobs.store import JobStore
from finetune.jobs.tracking import TrackingSync
from finetune.runtime.cores import available_cores
from finetune.runtime.tracing import Attributes, Tracing
from finetune.storage.files import files_under, folder_bytes, modified_ns, read_json, write_atomic
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir

log = logging.getLogger(__name__)

_LOG_TAIL_LINES, _LOG_TAIL_BYTES = 8, 4096
_CANCEL_POLL_SECONDS = 0.5
_CLAIM_POLL_SECONDS = 0.5
_TICK_SECONDS = 0.1
_MEMORY_CHECK_SECONDS = 1.0
_TRACKING_SECONDS = 60.0


@dataclass(frozen=True)
class WorkerSettings:
    """The settings of a worker.

    Args:
        slots: number of concurrent attempts; with GPUs at most one on each.
        threads: CPU threads, divided among the slots.
        heartbeat_seconds: how often a lease is renewed; a fraction of the lease.
        cancel_grace_seconds: how long a run may take to write a checkpoint when it is asked to stop.
        stall_seconds: a run that writes nothing for this long counts as hung.
        retry_base_seconds: the pause after the first failed attempt; it doubles with each further one without progress.
        max_memory_bytes: a job whose processes use more fails; None for no limit.
        kinds: names of the kinds of jobs that it claims.
        min_free_bytes: with less free space on the workspace's disk no new attempt is started.
    """

    name: str = field(default_factory=lambda: f"{socket.gethostname()[:60]}-{os.getpid()}")
    slots: int = 1
    threads: int = field(default_factory=available_cores)
    gpus: tuple[int, ...] = ()
    heartbeat_seconds: float = 5.0
    cancel_grace_seconds: float = 20.0
    stall_seconds: float = 1800.0
    retry_base_seconds: float = 2.0
    max_memory_bytes: int | None = None
    min_free_bytes: int = 256 * 2**20
    kinds: tuple[str, ...] = tuple(KINDS)

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise InvalidInput(f"slots {self.slots}: a worker runs at least one job at a time")
        if self.gpus and self.slots > len(self.gpus):
            raise InvalidInput(f"slots {self.slots}: there are {len(self.gpus)} GPUs, and each job takes one of its own")


@dataclass
class _Attempt:
    claim: Claim
    run: RunDir
    handle: Handle
    lease_file: Path  # one for each claim, so that a worker that lost the job cannot write that of the next worker
    gpus: tuple[int, ...]
    milestones_before: frozenset[str]
    memory_kills_before: int
    exit_code: int | None = None
    heartbeat_at: float = -math.inf  # monotonic seconds, as all times here
    looked_at: float = -math.inf
    written_at: float = field(default_factory=time.monotonic)  # when the run last wrote something
    mtimes: tuple[int | None, ...] = ()
    n_records: int = 0
    cancelling: bool = False
    hung: bool = False
    memory_checked_at: float = -math.inf
    memory_bytes: int | None = None  # the memory that it used when it exceeded the limit
    began: float = field(default_factory=time.time)  # Unix seconds, as in `phases`
    phases: list[tuple[str, float]] = field(default_factory=list)  # each phase and when it was first seen


class Worker:
    """Executes queued jobs. Call `run` from the main thread: child processes end with the thread that started them."""

    def __init__(
        self, store: JobStore, executor: Executor, home: Path, settings: WorkerSettings, tracing: Tracing | None = None
    ) -> None:
        self.tracing = tracing
        self.store = store
        self.executor = executor
        self.home = home
        self.settings = settings
        self._attempts: dict[str, _Attempt] = {}  # by job id
        self._tracking = TrackingSync(store, home)
        self._stop_signals = 0
        self._reaped_at = self._claimed_at = -math.inf

    def run(self, *, until_idle: bool = False) -> None:
        """Work until SIGTERM or SIGINT, then return all jobs to the queue; with `until_idle`, until no job is left."""
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        log.info("worker %s waits for jobs in %s", self.settings.name, self.home)
        try:
            while not self._stop_signals:
                self.step()
                if until_idle and not self._attempts and self._nothing_left():
                    self._tracking.finish(_TRACKING_SECONDS)
                    return
                time.sleep(_TICK_SECONDS)
            self._requeue_all()
        finally:
            self._tracking.stop()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def step(self) -> None:
        """Check every attempt once, requeue jobs of dead workers, and start jobs in free slots."""
        for attempt in list(self._attempts.values()):
            self._watch_safely(attempt)
        now = time.monotonic()
        try:
            if now - self._reaped_at >= self.settings.heartbeat_seconds:
                self._reaped_at = now
                for job_id in self.store.reap():
                    log.warning("%s: its worker is gone", job_id)
            if now - self._claimed_at >= _CLAIM_POLL_SECONDS:
                self._claimed_at = now
                self._fill_slots()
            self._tracking.step()
        except (StoreError, DiskFull) as error:
            log.warning("%s", error)

    def _stop(self, _number: int, _frame: Any) -> None:
        self._stop_signals += 1

    def _nothing_left(self) -> bool:
        return not self.store.counts(kinds=self.settings.kinds).keys() & set(UNFINISHED)

    # starting -----------------------------------------------------------------------------------------------------

    def _fill_slots(self) -> None:
        while len(self._attempts) < self.settings.slots:
            if self._disk_is_full():
                log.warning("%s: the disk is full; nothing new is started", self.home)
                return
            asked_at = machine_time()
            claim = self.store.claim(self.settings.name, self.settings.kinds)
            if claim is None:
                return
            try:
                self._attempts[claim.job.id] = self._begin(claim, asked_at)
            except (DiskFull, ExecutorError, OSError) as error:
                self.store.requeue(claim, f"The run could not be started: {error}", delay_seconds=60.0, counted=None)

    def _begin(self, claim: Claim, asked_at: LeaseTime) -> _Attempt:
        run = RunDir(self.home / "runs" / claim.job.id).create()
        spec_file, lease_file = run.root / "request.yaml", run.root / f"lease-{claim.fence}"
        for leftover in (*_leases_before(claim, run), run.error, run.progress):
            leftover.unlink(missing_ok=True)
        write_atomic(spec_file, lambda stream: stream.write(yaml.safe_dump(dict(claim.job.spec), allow_unicode=True).encode()))
        write_lease(lease_file, asked_at, self.store.lease_seconds)
        self._reserve_name(claim.job)
        gpus = self._free_gpu()
        command = [sys.executable, "-m", "finetune", claim.job.kind.command, str(spec_file), "--run-dir", str(run.root), "--json"]
        dataset = FileStore(self.store.engine).dataset_name(str(claim.job.spec.get("training_file", "")))
        handle = self.executor.start(
            claim.job.id,
            [*command, *(["--experiment", dataset] if dataset and claim.job.kind.tracked else [])],
            fence=claim.fence,
            environment={"FINETUNE_HOME": str(self.home), LEASE_VARIABLE: str(lease_file)},
            log=run.log,
            resources=Resources(max(1, self.settings.threads // self.settings.slots), gpus),
        )
        log.info("%s: attempt %d started, process %s", claim.job.id, claim.job.attempts, handle.reference)
        return _Attempt(claim, run, handle, lease_file, gpus, _milestones(run), _memory_kills())

    def _reserve_name(self, job: Job) -> None:
        """Reserve the model's name for the owner, who then owns it even if the job dies right after registering."""
        if job.suffix is not None:
            visibility: Visibility = "shared" if job.owner == LOCAL_OWNER else "private"
            Registry(self.home / "models").reserve(job.suffix, Access(job.owner, visibility))

    def _disk_is_full(self) -> bool:
        return shutil.disk_usage(self.home).free < self.settings.min_free_bytes

    def _free_gpu(self) -> tuple[int, ...]:
        taken = {gpu for attempt in self._attempts.values() for gpu in attempt.gpus}
        return tuple(gpu for gpu in self.settings.gpus if gpu not in taken)[:1]

    # watching -----------------------------------------------------------------------------------------------------

    def _watch_safely(self, attempt: _Attempt) -> None:
        """Watch an attempt; abandon it if the lease is lost, and retry after a failure of database, disk or cluster."""
        try:
            self._watch(attempt)
        except LeaseLost:
            self._abandon(attempt)
        except (StoreError, DiskFull, ExecutorError, OSError) as error:
            log.warning("%s: %s", attempt.claim.job.id, error)
            attempt.heartbeat_at = time.monotonic() - self.settings.heartbeat_seconds + _CANCEL_POLL_SECONDS

    def _watch(self, attempt: _Attempt) -> None:
        now = time.monotonic()
        if attempt.exit_code is None:
            attempt.exit_code = self.executor.poll(attempt.handle)
            if attempt.exit_code is not None:
                attempt.heartbeat_at = -math.inf  # the next heartbeat is due at once
        self._check_memory(attempt, now)
        if now - attempt.heartbeat_at >= self.settings.heartbeat_seconds:
            self._heartbeat(attempt)
            if attempt.exit_code is not None:
                self._finish_attempt(attempt, attempt.exit_code)
        elif attempt.exit_code is None and not attempt.cancelling and now - attempt.looked_at >= _CANCEL_POLL_SECONDS:
            attempt.looked_at = now
            if self.store.cancel_requested(attempt.claim):
                self._cancel(attempt)

    def _heartbeat(self, attempt: _Attempt) -> None:
        """Renew the lease, store what the run has written since the last call, and check that it has not stalled."""
        attempt.heartbeat_at = time.monotonic()
        asked_at = machine_time()
        self._check_for_stall(attempt)
        progress = read_json(attempt.run.progress) if attempt.run.progress.exists() else None
        if progress is not None and (not attempt.phases or attempt.phases[-1][0] != progress["phase"]):
            attempt.phases.append((str(progress["phase"]), time.time()))
        records = read_lines(attempt.run.events)
        cancelling = self.store.heartbeat(
            attempt.claim,
            phase=None if progress is None else str(progress["phase"]),
            progress=progress,
            progressed=bool(_milestones(attempt.run) - attempt.milestones_before),
            records=records if len(records) != attempt.n_records else (),
        )
        attempt.n_records = len(records)
        if attempt.exit_code is None:
            write_lease(attempt.lease_file, asked_at, self.store.lease_seconds)
        if cancelling and not attempt.cancelling:
            self._cancel(attempt)

    def _check_for_stall(self, attempt: _Attempt) -> None:
        run = attempt.run
        watched = (run.progress, run.metrics, run.events, run.checkpoints, run.log)
        mtimes = tuple(map(modified_ns, watched))
        if mtimes != attempt.mtimes:
            attempt.mtimes, attempt.written_at = mtimes, time.monotonic()
        elif attempt.exit_code is None and time.monotonic() - attempt.written_at > self.settings.stall_seconds:
            attempt.hung = True
            self.executor.cancel(attempt.handle, grace_seconds=0)

    def _check_memory(self, attempt: _Attempt, now: float) -> None:
        """Stop an attempt that exceeds the memory limit."""
        most = self.settings.max_memory_bytes
        if most is None or attempt.exit_code is not None or now - attempt.memory_checked_at < _MEMORY_CHECK_SECONDS:
            return
        attempt.memory_checked_at = now
        taken = self.executor.memory_bytes(attempt.handle)
        if taken is not None and taken > most:
            attempt.memory_bytes = taken
            self.executor.cancel(attempt.handle, grace_seconds=0)

    def _cancel(self, attempt: _Attempt) -> None:
        if attempt.exit_code is None:
            self.executor.cancel(attempt.handle, grace_seconds=self.settings.cancel_grace_seconds)
        attempt.cancelling = True

    # ending -------------------------------------------------------------------------------------------------------

    def _finish_attempt(self, attempt: _Attempt, exit_code: int) -> None:
        """End the job, or queue it again, after its attempt has ended."""
        run, claim, kind = attempt.run, attempt.claim, attempt.claim.job.kind
        complete = (run.root / kind.result).exists()
        stalled_attempts, lost_attempts = self.store.attempts_without_progress(claim)
        ending = Ending(
            exit_code=exit_code,
            error=read_json(run.error) if run.error.exists() else None,
            complete=complete,
            stalled_attempts=stalled_attempts,
            lost_attempts=lost_attempts,
            cancelling=attempt.cancelling,
            worker_stopping=bool(self._stop_signals),
            hung=attempt.hung,
            disk_full=self._disk_is_full(),
            memory_kills=_memory_kills() - attempt.memory_kills_before,
            memory_bytes=attempt.memory_bytes,
            max_memory_bytes=self.settings.max_memory_bytes,
            log_tail=_tail(run.log),
        )
        follows = next_action(ending, self.settings.retry_base_seconds)
        log.info("%s: exit code %d; %s", claim.job.id, exit_code, follows)
        if isinstance(follows, Finish):
            result: Mapping[str, Any] | None = read_json(run.root / kind.result) if complete else None
            self.store.finish(
                claim,
                follows.state,
                message=None if result is None else kind.conclude(result),
                result=result,
                error_code=follows.error_code,
                error_message=follows.error_message,
                stored_bytes=folder_bytes(run.root),
            )
        else:
            self.store.requeue(claim, follows.reason, delay_seconds=follows.delay_seconds, counted=follows.counted)
        if self.tracing is not None:
            self._record_span(self.tracing, attempt, str(follows))
        self._forget(attempt)

    def _record_span(self, tracing: Tracing, attempt: _Attempt, ending: str) -> None:
        """Record a tracing span of the attempt with a child span for each phase, dated by heartbeats."""
        job, ended = attempt.claim.job, time.time()
        about: Attributes = {"finetune.job": job.id, "finetune.attempt": job.attempts, "finetune.ending": ending}
        parent = tracing.add(f"{job.kind.title} {job.kind.describe(job.spec)}", attempt.began, ended, about)
        for (phase, at), (_, end) in itertools.pairwise([*attempt.phases, ("", ended)]):
            tracing.add(phase, at, end, {"finetune.job": job.id}, parent)

    def _abandon(self, attempt: _Attempt) -> None:
        """End the process of a job that another worker has claimed; write nothing."""
        log.warning("%s: the lease is lost; its process is ended", attempt.claim.job.id)
        attempt.lease_file.unlink(missing_ok=True)  # ends the process even if the executor does not respond
        try:
            if attempt.exit_code is None:
                self.executor.cancel(attempt.handle, grace_seconds=0)
                while self.executor.poll(attempt.handle) is None:
                    time.sleep(_TICK_SECONDS)
        except ExecutorError as error:
            log.warning("%s: %s", attempt.claim.job.id, error)
        self._forget(attempt)

    def _forget(self, attempt: _Attempt) -> None:
        attempt.lease_file.unlink(missing_ok=True)
        del self._attempts[attempt.claim.job.id]
        self._claimed_at = -math.inf  # a slot is free: claim at once

    def _requeue_all(self) -> None:
        """Stop gracefully: every run writes a checkpoint, and its job returns to the queue. A second signal stops at once.

        If the database does not accept the jobs for as long as a lease lasts, they are left until their leases expire.
        """
        log.info("worker %s stops; %d jobs are returned to the queue", self.settings.name, len(self._attempts))
        until = time.monotonic() + self.settings.cancel_grace_seconds + self.store.lease_seconds
        self._stop_all_attempts(self.settings.cancel_grace_seconds)
        while self._attempts and time.monotonic() < until:
            if self._stop_signals > 1:
                self._stop_all_attempts(0)
            for attempt in list(self._attempts.values()):
                self._watch_safely(attempt)
            time.sleep(_TICK_SECONDS)
        for job_id in self._attempts:
            log.warning("%s could not be returned to the queue; its lease will end", job_id)

    def _stop_all_attempts(self, grace_seconds: float) -> None:
        for attempt in self._attempts.values():
            try:
                if attempt.exit_code is None:
                    self.executor.cancel(attempt.handle, grace_seconds=grace_seconds)
            except ExecutorError as error:
                log.warning("%s: %s", attempt.claim.job.id, error)


def _leases_before(claim: Claim, run: RunDir) -> list[Path]:
    """Return the lease files of earlier claims. A file of a later claim must stay: its worker holds the job now."""
    return [path for path in run.root.glob("lease-*") if int(path.name.removeprefix("lease-")) < claim.fence]


def _milestones(run: RunDir) -> frozenset[str]:
    """Return the names of the run's completed work: checkpoints, finished children, finished parts of a batch."""
    found = (path.relative_to(run.root) for path in files_under(run.root))
    return frozenset(
        str(path)
        for path in found
        if path.match("checkpoints/step-*.sha256")  # written last
        or (path.parts[0] == "runs" and path.name == "outcome.json")
        or (path.parts[0] == "parts" and path.suffix == ".npz")
    )


def _memory_kills(counters: Path = Path("/proc/vmstat")) -> int:
    """Return how many processes the kernel has killed since boot because memory was exhausted."""
    if not counters.exists():
        return 0
    lines = (line.split() for line in counters.read_text().splitlines())
    return sum(int(value) for name, value in lines if name == "oom_kill")


def _tail(path: Path) -> str:
    if not path.exists():
        return "(nothing)"
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
        text = stream.read().decode("utf-8", "replace")
    return "\n".join(text.splitlines()[-_LOG_TAIL_LINES:]) or "(nothing)"
