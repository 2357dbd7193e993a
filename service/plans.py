"""Measure how fast this machine trains a backbone, in a child process, and cache the result (see `finetune.runs.forecast`)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from finetune.errors import Conflict, InvalidInput, Overloaded
from finetune.jobs.kinds import can_train
from finetune.runs.forecast import Speeds
from finetune.runs.known_speeds import find_speeds, speeds_file, speeds_key
from finetune.storage.files import write_json
from finetune.storage.workspace import Workspace
from service.child import ChildProgram, CpuTimeSpent
from service.worker import NO_TRAINING

CHILD = (sys.executable, "-m", "finetune.cli.speed_check")
SECONDS = 600  # the child limits its own CPU time
MAX_WAITING = 8
MAX_OF_OWNER = 3

MAX_REMEMBERED = 1000

Question = Mapping[str, Any]  # backbone, input_size_px, device, threads


@dataclass
class _Measurement:
    """A measurement that waits or runs, and who waits for it."""

    owner: str
    result: asyncio.Future[Speeds] = field(init=False)
    n_waiting: int = 0  # requests
    program: ChildProgram = field(default_factory=lambda: ChildProgram(CHILD, seconds=SECONDS))


class Planner:
    """Measures backbones one at a time, and caches the measurements in the workspace. One that nobody waits for is cancelled."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="measure")
        self._known: dict[str, Speeds] = {}
        self._unusable: dict[str, str] = {}  # why, of backbones that cannot be measured
        self._measuring: dict[str, _Measurement] = {}

    def stop(self) -> None:
        """Kill the child process, if there is one."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for measurement in self._measuring.values():
            measurement.program.stop()

    async def speeds(self, question: Question, owner: str) -> Speeds:
        """Return the speeds of a backbone on this machine; concurrent requests for it share one measurement.

        The measurement ends when the last of these requests is cancelled.

        Args:
            owner: who asks. At most `MAX_OF_OWNER` backbones of an owner wait or are measured, so that nobody fills the queue.

        Raises:
            Conflict: this installation cannot train.
            InvalidInput: the backbone cannot be used or measured.
            Overloaded: too many backbones wait, of this owner or in all, or the measurement failed.
        """
        if not can_train():
            raise Conflict(NO_TRAINING)
        key = speeds_key(question)
        if key in self._known:
            return self._known[key]
        if key in self._unusable:
            raise InvalidInput(self._unusable[key])
        measurement = self._measuring.get(key) or self._begin(key, question, owner)
        measurement.n_waiting += 1
        try:
            return await asyncio.shield(measurement.result)
        finally:
            measurement.n_waiting -= 1
            if not measurement.n_waiting and not measurement.result.done():
                del self._measuring[key]
                measurement.program.stop()
                measurement.result.cancel()

    def _begin(self, key: str, question: Question, owner: str) -> _Measurement:
        if sum(one.owner == owner for one in self._measuring.values()) >= MAX_OF_OWNER:
            raise Overloaded(f"{MAX_OF_OWNER} other backbones are being measured for you. Try again in a moment")
        if len(self._measuring) >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} other backbones wait to be measured. Try again in a moment")
        measurement = self._measuring[key] = _Measurement(owner)
        running = asyncio.get_running_loop().run_in_executor(self._executor, self._found, question, measurement)
        measurement.result = running
        running.add_done_callback(lambda done: self._measured(key, measurement, done))
        return measurement

    def _measured(self, key: str, measurement: _Measurement, done: asyncio.Future[Speeds]) -> None:
        if self._measuring.get(key) is measurement:
            del self._measuring[key]
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            self._known[key] = done.result()
        elif isinstance(error, InvalidInput):
            if len(self._unusable) >= MAX_REMEMBERED:
                self._unusable.clear()
            self._unusable[key] = error.message

    def _found(self, question: Question, measurement: _Measurement) -> Speeds:
        """Return the cached measurement of this workspace, else measure.

        Raises:
            InvalidInput: it takes more CPU time or memory than a plan may use, or the backbone cannot be used.
            Overloaded: it took too long or failed, which is not the fault of the backbone; or nobody waits for it any more.
        """
        if (known := find_speeds(self._workspace, question)) is not None:
            return known
        try:
            answer = measurement.program.run(
                {**question, "networks": str(self._workspace.networks)}, f"measuring {question['backbone']}"
            )
        except CpuTimeSpent:
            raise InvalidInput(
                f"{question['backbone']} takes too long to measure on this machine. A job may train it nevertheless"
            ) from None
        if "problem" in answer:
            raise InvalidInput(answer["problem"])
        write_json(speeds_file(self._workspace, question), answer["speeds"])
        return Speeds.from_dict(answer["speeds"])
