"""Compute the views of training images in separate processes, for a GPU that would otherwise wait for them. Torch-free.

Python holds its global lock for about half of the time that one view of a small photograph takes. Threads therefore compute
hardly more views than one thread does (about 1,500 a second), and they delay the thread that gives work to the GPU. Processes do
neither, but take seconds to start and about 150 MiB each, so they pay only where many views are needed in little time
(`finetune.training.compute`).

They are started as commands and not with `multiprocessing`, which would import the caller's own script again in each. A process
reads pickled tasks from its standard input and writes pickled answers to its standard output, so it ends when its parent does,
however that ends.
"""

from __future__ import annotations

import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import numpy as np

from finetune.data.loader import Batch, TrainLoader
from finetune.data.parallel import ordered_map
from finetune.errors import FinetuneError, OutOfMemory

BATCHES_AHEAD = 2  # beyond one for each process


class _Task(NamedTuple):
    epoch: int
    indices: np.ndarray  # (B,) positions in the samples
    times: np.ndarray  # (B,) how often each of them came earlier in the epoch


class _Answer(NamedTuple):
    batch: Batch | None
    error: FinetuneError | None
    cpu_seconds: float


class ViewProcesses:
    """Computes the batches of a `TrainLoader` in processes. They equal those that the loader itself yields.

    The processes start with the first batch and serve all epochs, until `close`.
    """

    def __init__(self, loader: TrainLoader, processes: int) -> None:
        if processes < 1:
            raise ValueError(f"processes must be at least 1, given {processes}")
        self.loader = replace(loader, threads=1)
        self.processes = processes
        self.cpu_seconds = 0.0  # that the processes took for the batches so far
        self._running: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from `start_step` to its end.

        Raises:
            ImageError: an image cannot be decoded; it is named.
            OutOfMemory: a process was killed, most probably because the machine has no memory left.
        """
        self._start()
        order, times = replace(self.loader, epoch=epoch, start_step=start_step).positions()
        parts = (slice(start, start + self.loader.batch_size) for start in range(0, len(order), self.loader.batch_size))
        tasks = (_Task(epoch, order[part], times[part]) for part in parts)
        ahead = self.processes + BATCHES_AHEAD
        with closing(ordered_map(self._computed, tasks, threads=self.processes, ahead=ahead)) as batches:
            yield from batches

    def close(self) -> None:
        """End the processes."""
        for process in self._running:
            process.kill()
        for process in self._running:
            for stream in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):  # the process was killed before it had read everything
                    stream.close()  # type: ignore[union-attr]
            process.wait()
        self._running.clear()
        self._idle = queue.SimpleQueue()

    def _computed(self, task: _Task) -> Batch:
        """Return the batch of a task from an idle process. There are as many processes as threads that call this."""
        process = self._idle.get()
        try:
            _write(process.stdin, task)
            answer: _Answer = pickle.load(process.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, pickle.UnpicklingError):
            raise OutOfMemory(
                f"one of {self.processes} processes that decode and augment images was killed, most probably because memory ran "
                "out. Give fewer threads (compute.threads), a smaller batch (hyperparameters.batch_size), or the machine more "
                "memory; the same command goes on from the last checkpoint"
            ) from None
        finally:
            self._idle.put(process)
        with self._lock:
            self.cpu_seconds += answer.cpu_seconds
        if answer.error is not None:
            raise answer.error
        assert answer.batch is not None
        return answer.batch

    def _start(self) -> None:
        if self._running:
            return
        # With `-m`, this module would be `__main__`, and pickled classes would not be found.
        command = [sys.executable, "-c", f"from {__name__} import main; main()"]
        for _ in range(self.processes):
            self._running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        for process in self._running:
            with suppress(BrokenPipeError):  # a process that has ended already is noticed at its first task
                _write(process.stdin, self.loader)
            self._idle.put(process)


def _write(stream: IO[bytes] | None, value: Any) -> None:
    assert stream is not None
    pickle.dump(value, stream, pickle.HIGHEST_PROTOCOL)
    stream.flush()


def _serve(tasks: IO[bytes], answers: IO[bytes]) -> None:
    """Read a pickled loader, then tasks, and write the answer of each, until the parent ends."""
    loader: TrainLoader = pickle.load(tasks)
    while True:
        try:
            task: _Task = pickle.load(tasks)
        except (EOFError, pickle.UnpicklingError):  # the parent has ended, perhaps while it was writing
            return
        before = time.process_time()
        batch = error = None
        try:
            batch = replace(loader, epoch=task.epoch).batch(task.indices, task.times)
        except FinetuneError as known:
            error = known
        _write(answers, _Answer(batch, error, time.process_time() - before))


def main() -> None:
    """Answer the parent process over the standard streams. Signals are ignored: the parent ends this process when it stops."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # the output of libraries must not mix with the answers
    with suppress(BrokenPipeError):
        _serve(sys.stdin.buffer, answers)
