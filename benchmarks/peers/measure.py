"""One process and all its children, measured from outside: wall seconds, CPU seconds, peak memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_SECONDS = 1.0
SAMPLED_FRACTION = 0.02  # of one core at most: a look at 2 GB of small pages takes some 50 ms


class CommandFailed(Exception):
    """A command that did not end well; the message is its last words."""


@dataclass(frozen=True)
class Cost:
    """What a command took.

    `peak_bytes` is of the whole tree at one moment: what is shared between its processes (PSS) counts once. `others_cpu_seconds`
    is what everything else on the machine computed meanwhile, this watcher included: near 0 on an idle machine.
    """

    seconds: float
    cpu_seconds: float
    others_cpu_seconds: float
    peak_bytes: int


def run_measured(arguments: Sequence[str], environment: dict[str, str], log: Path, timeout_seconds: float) -> Cost:
    """Run a command to its end, its output into ``<log>.out`` and ``<log>.err``.

    Raises:
        CommandFailed: it ended with another code than 0, or took too long.
    """
    out, err = log.with_suffix(".out"), log.with_suffix(".err")
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        began, busy_before = time.perf_counter(), _busy_seconds()
        # A group of its own, to be killed as one. Not a session: Linux may share the processor between sessions
        # evenly, whatever the niceness of the processes inside.
        process = subprocess.Popen(arguments, env=environment, stdout=stdout, stderr=stderr, process_group=0)
        with _stopped_with_us(process), _killed_after(process, timeout_seconds), _peak_memory(process.pid) as peak:
            _, status, usage = os.wait4(process.pid, 0)
            seconds, busy = time.perf_counter() - began, _busy_seconds() - busy_before
            process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        last_words = "\n".join((err.read_text(errors="replace") or out.read_text(errors="replace")).splitlines()[-15:])
        late = f"ended after {timeout_seconds:g} s; " if seconds >= timeout_seconds else ""
        raise CommandFailed(f"{late}exit code {process.returncode}\n{last_words}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Cost(seconds, cpu_seconds, max(0.0, busy - cpu_seconds), max(peak))


def _busy_seconds() -> float:
    """Of all cores since the machine started."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)  # guests are in user and nice already


@contextlib.contextmanager
def _stopped_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


@contextlib.contextmanager
def _killed_after(process: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
    timer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _peak_memory(pid: int) -> Iterator[list[int]]:
    """Samples of the tree's memory, in bytes, taken beside the block."""
    samples = [0]
    done = threading.Event()

    def watch() -> None:
        took = 0.0
        while not done.wait(max(SAMPLE_SECONDS, took / SAMPLED_FRACTION)):
            began = time.thread_time()
            samples.append(_tree_bytes(pid))
            took = time.thread_time() - began

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def _tree_bytes(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has just ended
                total += process.memory_full_info().pss
    return total
