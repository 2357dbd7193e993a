"""Send a tracker what it missed: incomplete runs, and the model registry.

Also a program, ``python -m finetune.tracking.sync < request``, for processes that must not import a tracker, such as workers. The
request is a JSON object with the keys ``home``, ``runs`` (folder -> final status of a run that could not record it, or null)
and ``models`` (whether to synchronise the registries). Exit code 1 means that something is still missing. It is safe to repeat.
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
from finetune.runtime.logs import configure_logs, wants_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking.mirror import Mirror, mirroring_lock, read_state
from finetune.tracking.tracker import Choice
from finetune.tracking.view import Status, experiment_of, top_of

LOCK_SECONDS = 10.0  # how long to wait for a follower that is about to end
BUSY = "another process is mirroring it"
NICENESS = 10

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Synchronised:
    """The result of synchronising one run. `reason` says why something is still missing in the tracker; empty if nothing is."""

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
    """Send what a tracker lacks of a run, or of the whole study that the run belongs to. Safe to repeat.

    Args:
        ended_as: the final status of a run whose process died before it could record it.
        wait_seconds: how long to wait for another process that is mirroring the run.
    """
    top = top_of(run)
    with mirroring_lock(top, choice.kind, seconds=wait_seconds) as had:
        if not had:
            return Synchronised(run, None, BUSY)
        mirror = Mirror(top, choice, workspace, experiment_of(top))
        alive = top.is_held()
        reason = mirror.update(alive=alive, ended_as=None if alive else ended_as, thorough=True)
        sent = mirror.state.runs.get(run.root.relative_to(top.root).as_posix())
        return Synchronised(run, sent.id if sent else None, reason)


def find_run(text: str, workspace: Workspace) -> RunDir:
    """Return the run that the user's `text` refers to: a folder, or the name of a run in the workspace.

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
    """Return the workspace's runs whose folders record that they were to be mirrored but are not complete."""
    found = [RunDir(folder) for folder in workspace.runs.glob("*") if folder.is_dir()]
    states = [(run, read_state(run, kind)) for run in found]
    return in_order([run for run, state in states if state is not None and not state.complete])


def in_order(runs: Sequence[RunDir]) -> list[RunDir]:
    """Return the runs in the order in which they ended, which is the order of the model versions that they registered."""
    return sorted(runs, key=lambda run: max((float(event["at"]) for event in read_lines(run.events)), default=0.0))


def sync_models(choice: Choice, workspace: Workspace) -> list[str]:
    """Synchronise versions and aliases of both registries; return one sentence for each difference that remains."""
    from finetune.tracking.mlflow.connection import connect, destination_of
    from finetune.tracking.mlflow.registry import synchronise

    target = destination_of(workspace, choice.destination)
    return synchronise(connect(target), target, workspace)


def main() -> None:
    configure_logs(as_json=wants_json(os.environ))
    os.nice(NICENESS)
    request = json.load(sys.stdin)
    workspace, choice = Workspace.at(Path(request["home"])), Choice("mlflow")
    sys.exit(0 if _carry_out(request["runs"], request["models"], choice, workspace) else 1)


def _carry_out(runs: Mapping[str, Status | None], models: bool, choice: Choice, workspace: Workspace) -> bool:
    complete = True
    for run in in_order([RunDir(Path(folder)) for folder in runs]):
        done = sync_run(run, choice, workspace, runs[str(run.root)])
        if done.reason:
            log.warning("MLflow lacks data of %s: %s", run.root.name, done.reason)
            complete = False
    if models:
        for note in sync_models(choice, workspace):
            log.warning("%s", note)
    return complete


if __name__ == "__main__":
    main()
