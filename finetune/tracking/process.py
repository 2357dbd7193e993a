"""What the doors use to have runs followed: one process for each tracker, started when a run begins and ended when it ends.

The process that trains imports nothing of a tracker and waits for nothing but, at the end and for a bounded time, for what is
still on its way. What is not there by then is sent by ``finetune mlflow sync``.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from finetune.events import TrackingInterrupted
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking.mirror import State, read_state, write_state
from finetune.tracking.tracker import Choice

WAIT_SECONDS = 30.0  # after a run that has ended
WAIT_SECONDS_WHEN_STOPPED = 5.0  # whoever is being stopped has little time
DYING_SECONDS = 2.0  # between asking a process to end and killing it


@contextlib.contextmanager
def followed(
    choices: Sequence[Choice], workspace: Workspace, experiment: str, *, wait_seconds: float = WAIT_SECONDS
) -> Iterator[Callable[[RunDir], None]]:
    """Follow the runs that begin in the block; yield what is to be called with the folder of each.

    At the end of the block it is waited, at most `wait_seconds`, until the trackers have everything.
    """
    followers = _Followers(choices, workspace, experiment)
    try:
        yield followers.begin
    except KeyboardInterrupt:
        followers.end(min(wait_seconds, WAIT_SECONDS_WHEN_STOPPED))
        raise
    except BaseException:
        followers.end(wait_seconds)
        raise
    followers.end(wait_seconds)


class _Followers:
    """The processes that follow the present run."""

    def __init__(self, choices: Sequence[Choice], workspace: Workspace, experiment: str) -> None:
        self._choices, self._workspace, self._experiment = choices, workspace, experiment
        self._run: RunDir | None = None
        self._processes: list[tuple[Choice, subprocess.Popen[bytes]]] = []

    def begin(self, run: RunDir) -> None:
        """Start to follow a run; one that was followed before has ended. A study's run is followed with the study."""
        if run.parent is not None:
            return
        self.end(WAIT_SECONDS_WHEN_STOPPED)
        self._run = run
        for choice in self._choices:
            if read_state(run, choice.kind) is None:  # so that a synchronisation knows of it, whatever happens to the process
                write_state(run, choice.kind, State(self._experiment))
            with contextlib.suppress(OSError):  # no memory or no disk for it: the run itself will say so
                self._processes.append((choice, self._start(run, choice)))

    def end(self, seconds: float) -> None:
        """Tell the processes that the run has ended, wait at most so long for them, then end them."""
        deadline = time.monotonic() + seconds
        for _, process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(f"{seconds}\n".encode())
        for choice, process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._note_unfinished(choice, f"no answer within {seconds:g} s")
            finally:  # a second Ctrl-C must not leave a process behind
                _stop(process)
        self._processes = []

    def _start(self, run: RunDir, choice: Choice) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "finetune.tracking.follow", "--tracker", str(choice)]
        command += ["--experiment", self._experiment, "--home", str(self._workspace.root), "--parent", str(os.getpid())]
        # What MLflow prints would be written over the progress bars.
        with open(run.tracking / f"{choice.kind}.log", "wb") as log:
            return subprocess.Popen(
                [*command, str(run.root)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the run, and so is the signal that ends a job's process group
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def _note_unfinished(self, choice: Choice, reason: str) -> None:
        assert self._run is not None
        message = f"{choice.kind} has not everything of this run yet ({reason}); finetune {choice.kind} sync sends the rest"
        with contextlib.suppress(OSError):
            self._run.record(TrackingInterrupted(message, choice.kind))


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(DYING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
