"""Mirror what a tracker missed: runs that it lacks something of, and the registry of models.

As a program (``python -m finetune.tracking.sync < request``), for processes that import no tracker, such as workers. The
request is a JSON object: ``home``, ``runs`` (folder -> how the run ended where it could not say so itself, or null) and
``models`` (whether the registries are to be synchronised). Exit code 1: something is missing still; repeating costs nothing.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import NotFound
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking.mirror import Mirror, alone, read_state
from finetune.tracking.tracker import Choice
from finetune.tracking.view import Status, experiment_of, top_of

LOCK_SECONDS = 10.0  # how long a follower that is about to end is waited for
BUSY = "another process is mirroring it"
NICENESS = 10

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Synchronised:
    """What became of one run. `reason` says what is missing in the tracker; empty: nothing."""

    run: RunDir
    run_id: str | None
    reason: str


def sync_run(
    run: RunDir,
    choice: Choice,
    workspace: Workspace,
    ended_as: Status | None = None,
    wait_seconds: float = LOCK_SECONDS,
) -> Synchronised:
    """Send what a tracker lacks of a run, and of the study that it belongs to; safe to repeat.

    Args:
        ended_as: how the run ended, where its process could not write that down.
        wait_seconds: how long a process that is mirroring it already is waited for.
    """
    top = top_of(run)
    with alone(top, choice.kind, seconds=wait_seconds) as had:
        if not had:
            return Synchronised(run, None, BUSY)
        mirror = Mirror(top, choice, workspace, experiment_of(top))
        alive = top.is_held()
        reason = mirror.update(alive=alive, ended_as=None if alive else ended_as, thorough=True)
        sent = mirror.state.runs.get(run.root.relative_to(top.root).as_posix())
        return Synchronised(run, sent.id if sent else None, reason)


def find_run(text: str, workspace: Workspace) -> RunDir:
    """Return the run that a person means: a folder, or the name of one in the workspace.

    Raises:
        NotFound: there is no such run.
    """
    for folder in (Path(text).absolute(), workspace.runs / text):
        run = RunDir(folder)
        if any(file.exists() for file in (run.spec, run.request, run.comparison)):
            return run
    known = sorted(folder.name for folder in workspace.runs.glob("*") if folder.is_dir())
    listed = f" Runs in {workspace.runs}: {', '.join(known[-10:])}" if known else f" There is none in {workspace.runs}"
    raise NotFound(f"no run {text!r}: give the folder of a run or comparison, or its name in the workspace.{listed}")


def incomplete_runs(workspace: Workspace, kind: str) -> list[RunDir]:
    """Return the runs of a workspace that were to be mirrored and are not, as far as their folders know."""
    found = [RunDir(folder) for folder in workspace.runs.glob("*") if folder.is_dir()]
    states = [(run, read_state(run, kind)) for run in found]
    return in_order([run for run, state in states if state is not None and not state.complete])


def in_order(runs: Sequence[RunDir]) -> list[RunDir]:
    """Return runs in the order in which they ended, which is that of the versions that they registered."""
    return sorted(runs, key=lambda run: max((float(event["at"]) for event in read_lines(run.events)), default=0.0))


def sync_models(choice: Choice, workspace: Workspace) -> list[str]:
    """Make versions and aliases the same in both registries; return what could not be made the same."""
    from finetune.tracking.mlflow.connection import connect, destination_of
    from finetune.tracking.mlflow.registry import synchronise

    target = destination_of(workspace, choice.destination)
    return synchronise(connect(target), target, workspace)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    os.nice(NICENESS)
    request = json.load(sys.stdin)
    workspace, choice = Workspace.at(Path(request["home"])), Choice("mlflow")
    sys.exit(0 if _carry_out(request["runs"], request["models"], choice, workspace) else 1)


def _carry_out(runs: Mapping[str, Status | None], models: bool, choice: Choice, workspace: Workspace) -> bool:
    complete = True
    for run in in_order([RunDir(Path(folder)) for folder in runs]):
        done = sync_run(run, choice, workspace, runs[str(run.root)])
        if done.reason:
            log.warning("MLflow has not everything of %s: %s", run.root.name, done.reason)
            complete = False
    if models:
        for note in sync_models(choice, workspace):
            log.warning("%s", note)
    return complete


if __name__ == "__main__":
    main()
