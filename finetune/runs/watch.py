"""Write the state of a running run to files: its latest progress, its cost so far, and the error that ended it."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from finetune.errors import FinetuneError
from finetune.events import Failed
from finetune.progress import Progress, ProgressCallback
from finetune.storage.files import read_json, write_json
from finetune.storage.rundir import RunDir

EVERY_SECONDS = 1.0


class Stopwatch:
    """Wall seconds, CPU seconds and peak memory of all attempts at a run together, kept in ``cost.json``.

    The file is written whenever progress is, so the cost of an attempt that is killed is not lost.
    """

    def __init__(self, run: RunDir) -> None:
        earlier = read_json(run.cost) if run.cost.exists() else {}
        self._earlier_wall, self._earlier_cpu = earlier.get("wall_seconds", 0.0), earlier.get("cpu_seconds", 0.0)
        self._earlier_peak = earlier.get("peak_memory_bytes", 0.0)
        self._wall, self._cpu = time.perf_counter(), _cpu_seconds()

    def read(self) -> dict[str, float]:
        """Return the cost so far: ``wall_seconds``, ``cpu_seconds`` (child processes included), ``peak_memory_bytes``."""
        return {
            "wall_seconds": self._earlier_wall + time.perf_counter() - self._wall,
            "cpu_seconds": self._earlier_cpu + _cpu_seconds() - self._cpu,
            "peak_memory_bytes": max(self._earlier_peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0),
        }


def recorded(progress: ProgressCallback, run: RunDir, stopwatch: Stopwatch) -> ProgressCallback:
    """Return a callback that calls `progress` and writes ``progress.json`` and ``cost.json`` at most once in `EVERY_SECONDS`."""
    written_at = 0.0

    def record(update: Progress) -> None:
        nonlocal written_at
        progress(update)
        now = time.monotonic()
        if now - written_at >= EVERY_SECONDS or update.done == update.total:
            written_at = now
            write_json(run.progress, {**asdict(update), "values": dict(update.values)})
            write_json(run.cost, stopwatch.read())

    return record


@contextmanager
def failures_recorded(run: RunDir) -> Iterator[None]:
    """Write a `FinetuneError` that the block raises into ``error.json`` and the events, and raise it again."""
    try:
        run.error.unlink(missing_ok=True)
        yield
    except FinetuneError as error:
        problems = [{"where": problem.where, "message": problem.message} for problem in error.problems]
        run.record(Failed(error.message, error.code))
        write_json(run.error, {"code": error.code, "message": error.message, "problems": problems})
        raise


def _cpu_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
