"""Measure how fast this machine trains a backbone, in a child process, and cache the result (see `finetune.runs.forecast`)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from finetune import __version__
from finetune.errors import Conflict, InvalidInput, Overloaded
from finetune.jobs.kinds import can_train
from finetune.runs.forecast import Speeds
from finetune.storage.files import read_json, write_json
from finetune.storage.workspace import Workspace
from service.child import ChildProgram
from service.worker import NO_TRAINING

CHILD = "finetune.cli.speed_check"
SECONDS = 600  # the child limits its own CPU time
MAX_WAITING = 8
MAX_OF_OWNER = 3

Question = Mapping[str, Any]  # backbone, input_size_px, device, threads


class Planner:
    """Measures backbones one at a time, and caches the measurements in the workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="measure")
        self._known: dict[str, Speeds] = {}
        self._measuring: dict[str, asyncio.Future[Speeds]] = {}
        self._owners: dict[str, str] = {}  # for whom each is measured
        self._child = ChildProgram(CHILD, seconds=SECONDS)

    def stop(self) -> None:
        """Kill the child process, if there is one."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._child.stop()

    async def speeds(self, question: Question, owner: str) -> Speeds:
        """Return the speeds of a backbone on this machine; concurrent requests for it share one measurement.

        Args:
            owner: who asks. At most `MAX_OF_OWNER` backbones of an owner wait or are measured, so that nobody fills the queue.

        Raises:
            Conflict: this installation cannot train.
            InvalidInput: the backbone cannot be used.
            Overloaded: too many backbones wait, of this owner or in all, or the measurement failed.
        """
        if not can_train():
            raise Conflict(NO_TRAINING)
        key = _key(question)
        if key in self._known:
            return self._known[key]
        if key not in self._measuring:
            if list(self._owners.values()).count(owner) >= MAX_OF_OWNER:
                raise Overloaded(f"{MAX_OF_OWNER} other backbones are being measured for you. Try again in a moment")
            if len(self._measuring) >= MAX_WAITING:
                raise Overloaded(f"{MAX_WAITING} other backbones wait to be measured. Try again in a moment")
            running = asyncio.get_running_loop().run_in_executor(self._executor, self._found, key, question)
            self._measuring[key], self._owners[key] = running, owner
            running.add_done_callback(lambda done: self._measured(key, done))
        return await asyncio.shield(self._measuring[key])

    def _measured(self, key: str, done: asyncio.Future[Speeds]) -> None:
        del self._measuring[key], self._owners[key]
        if not done.cancelled() and done.exception() is None:
            self._known[key] = done.result()

    def _found(self, key: str, question: Question) -> Speeds:
        """Return the cached measurement of this workspace, else measure."""
        file = self._workspace.cache / "notes" / f"speeds-{key}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # missing, or of another release
            return Speeds.from_dict(read_json(file))
        answer = self._child.ask({**question, "networks": str(self._workspace.networks)}, f"measuring {question['backbone']}")
        if "problem" in answer:
            raise InvalidInput(answer["problem"])
        write_json(file, answer["speeds"])
        return Speeds.from_dict(answer["speeds"])


def _key(question: Question) -> str:
    text = json.dumps([__version__, dict(question)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
