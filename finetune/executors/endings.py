"""Decide, when an attempt at a job has ended, whether the job ends too or is tried again. A pure function of the facts."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.executors.executor import EXIT_BUSY
from finetune.messages import byte_size

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130
MAX_STALLED_ATTEMPTS = 3  # in a row without a new checkpoint; after that the job fails as a crash loop
MAX_LOST_ATTEMPTS = 10  # the same for attempts that lost their worker or their lease, which is rarely the job's fault
MAX_OUT_OF_MEMORY = 2  # the first time, other processes may have used the memory; the second time, the job needs too much
DISK_FULL_SECONDS = 60.0
BUSY_SECONDS = 5.0
LONGEST_DELAY_SECONDS = 600.0

_SMALLER = "Try a smaller hyperparameters.batch_size or model.input_size_px, or a method that trains fewer stages."


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    Args:
        exit_code: of the attempt's process; negative if a signal ended it.
        error: the content of the run's ``error.json``; None if there is no such file.
        complete: whether the run has written its result, which it does last: a model that was to be registered is registered.
        stalled_attempts: number of attempts in a row, this one included, that wrote no new checkpoint.
        lost_attempts: the same number, of attempts that lost their worker or their lease.
        cancelling: whether the job's owner has cancelled it.
        worker_stopping: whether the worker stopped the attempt because the worker itself is stopping.
        hung: whether the worker stopped the attempt because it had reported no progress for too long.
        disk_full: whether the disk that the run writes to has (almost) no space left.
        memory_kills: number of processes on the whole machine that the kernel killed during the attempt because memory ran out.
        memory_bytes: memory that the attempt used, if the worker stopped it for exceeding the limit; else None.
        max_memory_bytes: the worker's memory limit for one job.
        log_tail: the last lines of the attempt's output.
    """

    exit_code: int
    error: Mapping[str, Any] | None = None
    complete: bool = False
    stalled_attempts: int = 1
    lost_attempts: int = 1
    cancelling: bool = False
    worker_stopping: bool = False
    hung: bool = False
    disk_full: bool = False
    memory_kills: int = 0
    memory_bytes: int | None = None
    max_memory_bytes: int | None = None
    log_tail: str = ""


@dataclass(frozen=True)
class Finish:
    """The decision that the job has ended, and in which state."""

    state: Literal["succeeded", "failed", "cancelled"]
    error_code: str | None = None
    error_message: str | None = None


@dataclass(frozen=True)
class TryAgain:
    """The decision that the job returns to the queue.

    Args:
        delay_seconds: how long the job waits before it may be claimed again.
        counted: the counter that this attempt increases if it wrote no new checkpoint; None: neither.
    """

    reason: str
    delay_seconds: float = 0.0
    counted: Literal["stalled", "lost"] | None = "stalled"


def next_action(ending: Ending, retry_base_seconds: float = 2.0) -> Finish | TryAgain:
    """Decide what happens to a job after an attempt at it has ended.

    A complete run has succeeded, whatever its exit code. Otherwise these are considered in this order: a cancellation, the memory
    limit, invalid input, a stopping worker, a busy run folder, a full disk, the run's own error. Any other end is a crash, which
    is tried again.

    Args:
        retry_base_seconds: delay after the first crash; it doubles with each further one.
    """
    code = None if ending.error is None else str(ending.error["code"])
    if ending.complete:
        return Finish("succeeded")
    if ending.cancelling:
        return Finish("cancelled")
    if ending.memory_bytes is not None and ending.max_memory_bytes is not None:
        taken, allowed = byte_size(ending.memory_bytes), byte_size(ending.max_memory_bytes)
        return Finish("failed", "out_of_memory", f"The run took {taken} of memory; its worker allows {allowed} a job. {_SMALLER}")
    if ending.exit_code == EXIT_BAD_INPUT:
        return _failed(ending, code or "invalid_input")
    if ending.worker_stopping:
        return TryAgain("The worker was stopped; the run goes on from its newest checkpoint.", counted=None)
    if ending.exit_code == EXIT_BUSY:
        reason = "The run could not begin: another process holds its folder, or no machine was ready for it (its log says more)."
        return TryAgain(reason, BUSY_SECONDS, counted=None)
    if code == "disk_full" or (code is None and ending.disk_full):  # a run may be unable to write this error on a full disk
        return TryAgain(_description(ending), DISK_FULL_SECONDS, counted=None)
    if code is not None and code != "out_of_memory":
        return _failed(ending, code)
    return _after_crash(ending, code, retry_base_seconds)


def _after_crash(ending: Ending, code: str | None, retry_base_seconds: float) -> Finish | TryAgain:
    """Try again after a crash, until too many attempts in a row have written no new checkpoint."""
    if ending.exit_code == EXIT_INTERRUPTED and ending.lost_attempts < MAX_LOST_ATTEMPTS and not ending.hung:
        return TryAgain(_description(ending), retry_base_seconds, counted="lost")
    memory_ran_out = code == "out_of_memory" or _killed_for_memory(ending)
    if ending.stalled_attempts >= (MAX_OUT_OF_MEMORY if memory_ran_out else MAX_STALLED_ATTEMPTS):
        times = f"It ended like this {ending.stalled_attempts} times in a row without a new checkpoint."
        message = f"{_description(ending)} {times} The log ends with:\n{ending.log_tail}"
        return Finish("failed", "out_of_memory" if memory_ran_out else "stalled" if ending.hung else "crash_loop", message)
    doubled = retry_base_seconds * 2.0 ** max(ending.stalled_attempts - 1, 0)
    return TryAgain(_description(ending), min(doubled, LONGEST_DELAY_SECONDS))


def _failed(ending: Ending, code: str) -> Finish:
    if ending.error is None:
        return Finish("failed", code, f"{_description(ending)} The log ends with:\n{ending.log_tail}")
    problems = [f"{problem['where']}: {problem['message']}" for problem in ending.error.get("problems", ())]
    return Finish("failed", code, "\n".join([str(ending.error["message"]), *problems]))


def _description(ending: Ending) -> str:
    """Return a sentence that says how the attempt ended."""
    if ending.error is not None:
        return f"The run failed: {ending.error['message']}"
    if ending.disk_full:
        return "The run ended, and the disk is full."
    if ending.hung:
        return "The run showed no progress for too long and was stopped."
    if _killed_for_memory(ending):
        return f"The kernel killed the run, because memory ran out. {_SMALLER}"
    if ending.exit_code == -signal.SIGKILL:
        return "The run was killed (signal 9)."
    if ending.exit_code < 0:
        return f"The run was ended by signal {-ending.exit_code} ({_signal_name(-ending.exit_code)})."
    if ending.exit_code == EXIT_INTERRUPTED:
        return "The run was interrupted, most likely because its worker could not renew its lease in time."
    return f"The run ended with exit code {ending.exit_code}, and without a result."


def _killed_for_memory(ending: Ending) -> bool:
    return ending.exit_code == -signal.SIGKILL and ending.memory_kills > 0 and not ending.hung


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else "unknown"
