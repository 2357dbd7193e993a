"""Mirror a run to a tracker while it is in progress: the process that `finetune.tracking.process` starts for each tracker.

The training process holds the other end of this process's standard input. A line on it means that the run has ended and
contains the number of seconds that this process may still take. End of file without a line means that the training process was
killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from finetune.events import Event, TrackingInterrupted, TrackingRecovered
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking.mirror import Mirror, mirroring_lock
from finetune.tracking.tracker import Choice, parse_choice

EVERY_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 60.0  # between two attempts while a tracker does not respond
AFTER_A_KILL_SECONDS = 60.0  # how long to try to report the end of a killed run
DEATH_SECONDS = 0.01  # between two checks whether a killed process has ended
LOCK_SECONDS = 0.5  # between two attempts to get the lock of the mirror
USED_SHARE = 0.9  # of the seconds that the training process waits
NICENESS = 10  # training has priority


@dataclass
class TrainingProcess:
    """The training process that is followed.

    Args:
        input: file descriptor whose end of file means that the process has died.
        pid: of the process. Its forked children may keep `input` open after its death, so the pid is checked as well.
    """

    input: int
    pid: int

    def wait(self, seconds: float) -> float | None:
        """Wait at most `seconds` for the run to end; return how many seconds this process has left, None if the run continues."""
        deadline = time.monotonic() + seconds
        while True:
            ready, _, _ = select.select([self.input], [], [], min(1.0, max(0.0, deadline - time.monotonic())))
            if ready:
                line = os.read(self.input, 100).decode("ascii", "replace").strip()
                return float(line) if line else self._wait_for_death()
            if os.getppid() != self.pid:
                return AFTER_A_KILL_SECONDS
            if time.monotonic() >= deadline:
                return None

    def _wait_for_death(self) -> float:
        """Wait until the killed process has ended and released its locks; return how many seconds this process has left.

        The kernel closes the files of a killed process one by one, so `input` may end before the run's lock is released.
        """
        deadline = time.monotonic() + AFTER_A_KILL_SECONDS
        while os.getppid() == self.pid and time.monotonic() < deadline:
            time.sleep(DEATH_SECONDS)
        return max(0.0, deadline - time.monotonic())


def follow(run: RunDir, choice: Choice, workspace: Workspace, experiment: str, training: TrainingProcess) -> bool:
    """Mirror a run until it has ended; return whether the tracker has received everything."""
    while True:
        with mirroring_lock(run, choice.kind, seconds=0) as had:
            if had:
                return _follow(Mirror(run, choice, workspace, experiment), training)
        if training.wait(LOCK_SECONDS) is not None:  # an earlier attempt's follower or a sync still mirrors the run
            return False


def _follow(mirror: Mirror, training: TrainingProcess) -> bool:
    mirror.state.attempts += 1
    reporter = _Reporter(mirror.run, mirror.choice.kind)
    failures, seconds_left = 0, None
    while seconds_left is None:
        reason = mirror.update(alive=True)
        reporter.report(reason)
        failures = failures + 1 if reason else 0
        seconds_left = training.wait(min(LONGEST_PAUSE_SECONDS, EVERY_SECONDS * 2**failures))
    deadline = time.monotonic() + USED_SHARE * seconds_left
    while True:
        # Another process may have resumed the run in the meantime; it has its own follower.
        reason = mirror.update(alive=mirror.run.is_held())
        if not reason or time.monotonic() >= deadline:
            reporter.report(reason)
            return not reason
        time.sleep(min(EVERY_SECONDS, max(0.0, deadline - time.monotonic())))


class _Reporter:
    """Records one event when a tracker stops responding and one when it has recovered, instead of one for each attempt."""

    def __init__(self, run: RunDir, kind: str) -> None:
        self._run, self._kind, self._reason = run, kind, ""

    def report(self, reason: str) -> None:
        if reason and not self._reason:
            message = f"{self._kind} cannot be written ({reason}). The run continues; missing data is sent later"
            self._record(TrackingInterrupted(message, self._kind))
        if self._reason and not reason:
            self._record(TrackingRecovered(f"{self._kind} responds again, and is complete", self._kind))
        self._reason = reason

    def _record(self, event: Event) -> None:
        with contextlib.suppress(OSError):  # a full disk is reported by the run itself
            self._run.record(event)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m finetune.tracking.follow")
    for name in ("--tracker", "--experiment", "--home"):
        parser.add_argument(name, required=True)
    parser.add_argument("--parent", required=True, type=int)
    parser.add_argument("run", type=Path)
    given = parser.parse_args()
    os.nice(NICENESS)
    training = TrainingProcess(sys.stdin.fileno(), given.parent)
    workspace = Workspace.at(Path(given.home))
    complete = follow(RunDir(given.run), parse_choice(given.tracker), workspace, given.experiment, training)
    sys.stdout.flush()
    sys.stderr.flush()
    # Skip the interpreter's cleanup: with MLflow loaded it takes a second, for which the run would wait.
    os._exit(0 if complete else 1)


if __name__ == "__main__":
    main()
