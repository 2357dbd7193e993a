"""What follows from the end of an attempt: the job has ended too, or it is tried again. A pure function of facts."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.executors.executor import EXIT_BUSY
from finetune.messages import byte_size

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130
MAX_STALLED_ATTEMPTS = 3  # in a row without a new checkpoint, after which the job is a crash loop
MAX_LOST_ATTEMPTS = 10  # the same, of those that ended with their worker or for want of a lease, which is rarely the job's fault
MAX_OUT_OF_MEMORY = 2  # memory that was short once may have been somebody else's; twice, the job wants too much
DISK_FULL_SECONDS = 60.0
BUSY_SECONDS = 5.0
LONGEST_DELAY_SECONDS = 600.0

_SMALLER = "Try a smaller hyperparameters.batch_size or model.input_size_px, or a method that trains fewer stages."


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    Args:
        exit_code: negative: the signal that ended it.
        error: the run's ``error.json``, if it wrote one.
        complete: the run's result is there, which is written last: whatever it was to register is registered.
        stalled_attempts: attempts in a row, this one included, that wrote no new checkpoint.
        lost_attempts: the same, if this one counts as lost.
        cancelling: the job's owner asked for the end.
        handing_back: the worker asked for the end, because it stops itself.
        hung: the worker ended it, because it showed no progress for too long.
        disk_full: (almost) no space is left where the run writes.
        memory_kills: processes that the kernel killed for want of memory meanwhile, on the whole machine.
        memory_bytes: what it took, if the worker ended it because that was more than it allows.
        max_memory_bytes: what the worker allows.
        log_tail: the last lines of what it printed.
    """

    exit_code: int
    error: Mapping[str, Any] | None = None
    complete: bool = False
    stalled_attempts: int = 1
    lost_attempts: int = 1
    cancelling: bool = False
    handing_back: bool = False
    hung: bool = False
    disk_full: bool = False
    memory_kills: int = 0
    memory_bytes: int | None = None
    max_memory_bytes: int | None = None
    log_tail: str = ""


@dataclass(frozen=True)
class Finish:
    """The job has ended."""

    state: Literal["succeeded", "failed", "cancelled"]
    error_code: str | None = None
    error_message: str | None = None


@dataclass(frozen=True)
class TryAgain:
    """The job goes back to the queue. `counted`: as what, towards a crash loop, if the attempt wrote no new checkpoint."""

    reason: str
    delay_seconds: float = 0.0
    counted: Literal["stalled", "lost"] | None = "stalled"


def what_follows(ending: Ending, retry_base_seconds: float = 2.0) -> Finish | TryAgain:
    """A complete run has succeeded however its process ended; else who asked for the end counts, then what the run says."""
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
    if ending.handing_back:
        return TryAgain("The worker was stopped; the run goes on from its newest checkpoint.", counted=None)
    if ending.exit_code == EXIT_BUSY:
        reason = "The run could not begin: another process holds its folder, or no machine was ready for it (its log says more)."
        return TryAgain(reason, BUSY_SECONDS, counted=None)
    if code == "disk_full" or (code is None and ending.disk_full):  # a run on a full disk may be unable to say so
        return TryAgain(_what_happened(ending), DISK_FULL_SECONDS, counted=None)
    if code is not None and code != "out_of_memory":
        return _failed(ending, code)
    return _after_a_death(ending, code, retry_base_seconds)


def _after_a_death(ending: Ending, code: str | None, retry_base_seconds: float) -> Finish | TryAgain:
    """Another attempt may cure it, but not for ever when no attempt gets anywhere."""
    if ending.exit_code == EXIT_INTERRUPTED and ending.lost_attempts < MAX_LOST_ATTEMPTS and not ending.hung:
        return TryAgain(_what_happened(ending), retry_base_seconds, counted="lost")
    starved = code == "out_of_memory" or _killed_for_memory(ending)
    if ending.stalled_attempts >= (MAX_OUT_OF_MEMORY if starved else MAX_STALLED_ATTEMPTS):
        times = f"It ended so {ending.stalled_attempts} times in a row without a new checkpoint."
        message = f"{_what_happened(ending)} {times} The log ends with:\n{ending.log_tail}"
        return Finish("failed", "out_of_memory" if starved else "stalled" if ending.hung else "crash_loop", message)
    doubled = retry_base_seconds * 2.0 ** max(ending.stalled_attempts - 1, 0)
    return TryAgain(_what_happened(ending), min(doubled, LONGEST_DELAY_SECONDS))


def _failed(ending: Ending, code: str) -> Finish:
    if ending.error is None:
        return Finish("failed", code, f"{_what_happened(ending)} The log ends with:\n{ending.log_tail}")
    problems = [f"{problem['where']}: {problem['message']}" for problem in ending.error.get("problems", ())]
    return Finish("failed", code, "\n".join([str(ending.error["message"]), *problems]))


def _what_happened(ending: Ending) -> str:
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
        return f"The run died of signal {-ending.exit_code} ({_signal_name(-ending.exit_code)})."
    if ending.exit_code == EXIT_INTERRUPTED:
        return "The run was interrupted, most likely because its worker could not renew its lease in time."
    return f"The run ended with exit code {ending.exit_code}, and without a result."


def _killed_for_memory(ending: Ending) -> bool:
    return ending.exit_code == -signal.SIGKILL and ending.memory_kills > 0 and not ending.hung


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else "unknown"
