"""Follow a run while it goes on: the process that `finetune.tracking.process` starts for each tracker.

It lives as long as the process that trains, which holds the other end of its standard input: a line there says that the run
has ended and how long this process may still take; the end of the input without a line says that the other process was
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
from finetune.tracking.mirror import Mirror, alone
from finetune.tracking.tracker import Choice, parse_choice

EVERY_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 60.0  # between two attempts while a tracker does not answer
AFTER_A_KILL_SECONDS = 60.0  # how long a killed run's end is tried to be told
DEATH_SECONDS = 0.01  # between two looks whether a process that was killed is gone
LOCK_SECONDS = 0.5  # between two looks whether another process has finished with the run
USED_SHARE = 0.9  # of the time that the door waits
NICENESS = 10  # training comes first


@dataclass
class Door:
    """The process that runs the training, as its follower sees it.

    Args:
        input: file descriptor whose end means that the process is gone.
        pid: of the process. Processes that it forked may keep `input` open after its death.
    """

    input: int
    pid: int

    def wait(self, seconds: float) -> float | None:
        """Wait, at most so long, until the run has ended; return how many seconds are left then, None while it goes on."""
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
        """Wait until a process that was killed is gone with its locks; return how many seconds are left.

        The kernel closes the files of such a process one after the other: `input` may end while the run's lock still seems held.
        """
        deadline = time.monotonic() + AFTER_A_KILL_SECONDS
        while os.getppid() == self.pid and time.monotonic() < deadline:
            time.sleep(DEATH_SECONDS)
        return max(0.0, deadline - time.monotonic())


def follow(run: RunDir, choice: Choice, workspace: Workspace, experiment: str, door: Door) -> bool:
    """Mirror a run until it has ended; return whether the tracker has all of it."""
    while True:
        with alone(run, choice.kind, seconds=0) as had:
            if had:
                return _follow(Mirror(run, choice, workspace, experiment), door)
        if door.wait(LOCK_SECONDS) is not None:  # the follower of an earlier attempt, or a synchronisation, is still at it
            return False


def _follow(mirror: Mirror, door: Door) -> bool:
    mirror.state.attempts += 1
    reporter = _Reporter(mirror.run, mirror.choice.kind)
    failures, seconds_left = 0, None
    while seconds_left is None:
        reason = mirror.update(alive=True)
        reporter.report(reason)
        failures = failures + 1 if reason else 0
        seconds_left = door.wait(min(LONGEST_PAUSE_SECONDS, EVERY_SECONDS * 2**failures))
    deadline = time.monotonic() + USED_SHARE * seconds_left
    while True:
        # Another process may have begun to work on the run meanwhile, and has a follower of its own.
        reason = mirror.update(alive=mirror.run.is_held())
        if not reason or time.monotonic() >= deadline:
            reporter.report(reason)
            return not reason
        time.sleep(min(EVERY_SECONDS, max(0.0, deadline - time.monotonic())))


class _Reporter:
    """Records one event when a tracker stops answering, and one when it has everything again; not one for each attempt."""

    def __init__(self, run: RunDir, kind: str) -> None:
        self._run, self._kind, self._reason = run, kind, ""

    def report(self, reason: str) -> None:
        if reason and not self._reason:
            message = f"{self._kind} cannot be written ({reason}). The run goes on; what is missing there is sent later"
            self._record(TrackingInterrupted(message, self._kind))
        if self._reason and not reason:
            self._record(TrackingRecovered(f"{self._kind} answers again, and has what it missed", self._kind))
        self._reason = reason

    def _record(self, event: Event) -> None:
        with contextlib.suppress(OSError):  # a full disk is the run's own trouble
            self._run.record(event)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m finetune.tracking.follow")
    for name in ("--tracker", "--experiment", "--home"):
        parser.add_argument(name, required=True)
    parser.add_argument("--parent", required=True, type=int)
    parser.add_argument("run", type=Path)
    given = parser.parse_args()
    os.nice(NICENESS)
    door = Door(sys.stdin.fileno(), given.parent)
    complete = follow(RunDir(given.run), parse_choice(given.tracker), Workspace.at(Path(given.home)), given.experiment, door)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if complete else 1)  # everything is sent; taking MLflow's modules down takes a second, and the run waits for it


if __name__ == "__main__":
    main()
