"""Start and stop the processes that mirror runs to trackers: one per tracker, from the beginning to the end of a run.

The training process imports no tracker library. It waits for a tracker only at the end of a run, for a bounded time; what is not
sent by then can be sent by ``finetune mlflow sync``.
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
from finetune.tracking.mirror import MirrorState, read_state, write_state
from finetune.tracking.tracker import Choice

WAIT_SECONDS = 30.0  # after a run that has ended
WAIT_SECONDS_WHEN_STOPPED = 5.0  # after Ctrl-C or SIGTERM
DYING_SECONDS = 2.0  # between asking a process to end and killing it


@contextlib.contextmanager
def followed(
    choices: Sequence[Choice], workspace: Workspace, experiment: str, *, wait_seconds: float = WAIT_SECONDS
) -> Iterator[Callable[[RunDir], None]]:
    """Mirror the runs that begin in the block; yield a function to call with the folder of each run that begins.

    At the end of the block, wait at most `wait_seconds` until the trackers have received everything.
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
    """The processes that mirror the current run."""

    def __init__(self, choices: Sequence[Choice], workspace: Workspace, experiment: str) -> None:
        self._choices, self._workspace, self._experiment = choices, workspace, experiment
        self._run: RunDir | None = None
        self._processes: list[tuple[Choice, subprocess.Popen[bytes]]] = []

    def begin(self, run: RunDir) -> None:
        """Start mirroring a run and stop mirroring the previous one. A study's child is skipped: the study includes it."""
        if run.parent is not None:
            return
        self.end(WAIT_SECONDS_WHEN_STOPPED)
        self._run = run
        for choice in self._choices:
            if read_state(run, choice.kind) is None:  # so that ``sync`` finds the run even if the process dies
                write_state(run, choice.kind, MirrorState(self._experiment))
            with contextlib.suppress(OSError):  # without memory or disk for it the run itself will fail and report it
                self._processes.append((choice, self._start(run, choice)))

    def end(self, seconds: float) -> None:
        """Tell the processes that the run has ended, wait at most `seconds` for them, then stop them."""
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
        # MLflow's output would overwrite the progress bars.
        with open(run.tracking / f"{choice.kind}.log", "wb") as log:
            return subprocess.Popen(
                [*command, str(run.root)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C and the signal to a job's process group must reach the run only
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def _note_unfinished(self, choice: Choice, reason: str) -> None:
        assert self._run is not None
        message = f"{choice.kind} lacks data of this run ({reason}); finetune {choice.kind} sync sends the rest"
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
