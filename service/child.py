"""Run a program with the training libraries, which the server must not import, as a child process."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.errors import Overloaded

log = logging.getLogger(__name__)


class CpuTimeSpent(Overloaded):
    """The program has used all the CPU time that it allows itself."""


class ChildProgram:
    """Runs a command with a JSON object as its input, and returns the JSON object that it writes.

    Call `run` from a thread that lives as long as the server, one call at a time: the child is killed when the thread that
    started it ends.
    """

    def __init__(self, command: Sequence[str], *, seconds: float) -> None:
        self._command = command
        self._seconds = seconds
        self._child: subprocess.Popen[str] | None = None
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Kill the child process, if there is one, and start no other."""
        self._stopping.set()
        if (child := self._child) is not None:
            child.kill()

    def run(self, given: Mapping[str, Any], what: str) -> dict[str, Any]:
        """Run the program once.

        Args:
            what: what it does, as the subject of an error's sentence.

        Raises:
            CpuTimeSpent: it used all the CPU time that it allows itself.
            Overloaded: it took too long, failed or was stopped, which is not the fault of what was given.
        """
        if self._stopping.is_set():
            raise Overloaded(f"{what} was stopped")
        die_with_parent = [sys.executable, "-m", "finetune.executors.process_parent", str(os.getpid())]
        child = subprocess.Popen(
            [*die_with_parent, *self._command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._child = child
        if self._stopping.is_set():
            child.kill()
        try:
            output, errors = child.communicate(json.dumps(given), timeout=self._seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            raise Overloaded(f"{what} took more than {self._seconds:g} s") from None
        finally:
            self._child = None
        if child.returncode != 0:
            if self._stopping.is_set():
                raise Overloaded(f"{what} was stopped")
            if child.returncode == -signal.SIGXCPU:
                raise CpuTimeSpent(f"{what} used all the CPU time that it may use")
            log.error("%s failed:\n%s", what, errors[-2000:])
            raise Overloaded(f"{what} failed; the server's log says why")
        answer: dict[str, Any] = json.loads(output)
        return answer
