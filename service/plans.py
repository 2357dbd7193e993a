"""Measure how fast this machine trains a backbone, in a child process, and cache the result (see `finetune.runs.forecast`)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from finetune import __version__
from finetune.errors import Conflict, InvalidInput, Overloaded
from finetune.jobs.kinds import can_train
from finetune.runs.forecast import Speeds
from finetune.storage.files import read_json, write_json
from finetune.storage.workspace import Workspace
from service.worker import NO_TRAINING

log = logging.getLogger(__name__)

CHILD = (sys.executable, "-m", "finetune.cli.speed_check")
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
        self._child: subprocess.Popen[str] | None = None
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Kill the child process, if there is one."""
        self._stopping.set()
        self._executor.shutdown(wait=False, cancel_futures=True)
        if (child := self._child) is not None:
            child.kill()

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
        answer = json.loads(self._ask({**question, "networks": str(self._workspace.networks)}))
        if "problem" in answer:
            raise InvalidInput(answer["problem"])
        write_json(file, answer["speeds"])
        return Speeds.from_dict(answer["speeds"])

    def _ask(self, given: Question) -> str:
        """Run the child process and return its output.

        Raises:
            Overloaded: it took too long or failed, which is not the fault of the backbone.
        """
        if self._stopping.is_set():
            raise Overloaded("this server is ending")
        die_with_parent = [sys.executable, "-m", "finetune.executors.process_parent", str(os.getpid())]
        child = subprocess.Popen(
            [*die_with_parent, *CHILD],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._child = child
        if self._stopping.is_set():
            child.kill()
        try:
            said, errors = child.communicate(json.dumps(given), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            raise Overloaded(f"measuring {given['backbone']} took more than {SECONDS} s") from None
        finally:
            self._child = None
        if child.returncode != 0:
            if not self._stopping.is_set():
                log.error("measuring %s failed:\n%s", given["backbone"], errors[-2000:])
            raise Overloaded(f"{given['backbone']} could not be measured; the server's log says why")
        return said


def _key(question: Question) -> str:
    text = json.dumps([__version__, dict(question)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
