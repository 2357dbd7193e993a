"""Carry out independent runs of a study in parallel, each in its own process, on this machine or on a cluster.

Each process executes `finetune train --run-dir` in the folder of its run, so it can be killed and resumed like any run. A process
that crashes is started again by the same rules as the attempts at a job (`finetune.executors.endings`).
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from finetune.errors import ExecutorError, FinetuneError, error_of
from finetune.executors import Executor, Handle
from finetune.executors.endings import Ending, Finish, next_action
from finetune.executors.slots import STOP_SECONDS, Slots
from finetune.jobs.lease import LEASE_VARIABLE
from finetune.progress import Progress, ProgressCallback
from finetune.runs.outcome import Outcome
from finetune.spec import JobSpec
from finetune.storage.files import read_json, write_atomic
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace

RETRY_SECONDS = 2.0  # delay before a crashed process is started again, the first time
_LOOK_SECONDS = 0.2
_LOG_CHARACTERS = 2000
_INHERITED = (LEASE_VARIABLE, "MLFLOW_TRACKING_URI")  # environment variables that processes on other machines need too


@dataclass
class _ParallelChild:
    """A child whose process is running, or waits to be started (again)."""

    title: str
    folder: RunDir
    slot: int
    handle: Handle | None = None
    not_before: float = 0.0  # monotonic seconds
    n_ended: int = 0  # number of its processes that have ended
    message: str = field(default="", repr=False)  # the last progress that was shown


def run_side_by_side(
    children: Sequence[tuple[str, JobSpec, RunDir]], slots: Slots, workspace: Workspace, progress: ProgressCallback
) -> Iterator[tuple[int, Outcome]]:
    """Run the children in parallel; yield the position and the outcome of each as it finishes.

    Args:
        children: title, spec and prepared folder of each.

    Raises:
        FinetuneError: a child failed. The others have been stopped, and are resumed by the next call.
        KeyboardInterrupt: this process was asked to stop. The children have been stopped too.
    """
    waiting = deque(range(len(children)))
    free = deque(range(len(slots.each)))
    going: dict[int, _ParallelChild] = {}
    try:
        while waiting or going:
            while waiting and free:
                number = waiting.popleft()
                title, spec, folder = children[number]
                _write_spec(folder, spec.with_absolute_paths())
                going[number] = _ParallelChild(title, folder, free.popleft())
            for number, child in list(going.items()):
                if (outcome := _advance(child, slots, workspace)) is not None:
                    del going[number]
                    free.append(child.slot)
                    yield number, outcome
            _report_progress(list(going.values()), progress)
            time.sleep(_LOOK_SECONDS)
    finally:
        _stop(list(going.values()), slots.executor)


def _write_spec(folder: RunDir, spec: JobSpec) -> None:
    text = spec.to_yaml().encode()
    write_atomic(folder.spec, lambda stream: stream.write(text))


def _advance(child: _ParallelChild, slots: Slots, workspace: Workspace) -> Outcome | None:
    """Start a child whose delay is over, or check its process; return its outcome if it has finished, else None.

    Raises:
        FinetuneError: the child has failed.
    """
    if child.handle is None:
        if time.monotonic() >= child.not_before:
            _start(child, slots, workspace)
        return None
    code = slots.executor.poll(child.handle)
    if code is None:
        return None
    child.handle = None
    child.n_ended += 1
    folder = child.folder
    follows = next_action(
        Ending(
            exit_code=code,
            error=read_json(folder.error) if folder.error.exists() else None,
            complete=folder.outcome.exists(),
            stalled_attempts=child.n_ended,
            lost_attempts=child.n_ended,
            log_tail=_log_tail(folder),
        ),
        RETRY_SECONDS,
    )
    if not isinstance(follows, Finish):
        child.not_before = time.monotonic() + follows.delay_seconds
        return None
    if follows.state == "succeeded":
        return Outcome.read(folder)
    raise _failure(child, follows)


def _start(child: _ParallelChild, slots: Slots, workspace: Workspace) -> None:
    """Start the process of a child."""
    folder = child.folder
    folder.error.unlink(missing_ok=True)
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    child.handle = slots.executor.start(
        "-".join(folder.root.relative_to(workspace.runs).parts) if folder.root.is_relative_to(workspace.runs) else folder.name,
        [sys.executable, "-m", "finetune", "train", str(folder.spec), "--run-dir", str(folder.root), "--json"],
        fence=time.time_ns(),
        environment={"FINETUNE_HOME": str(workspace.root), **inherited},
        log=folder.log,
        resources=slots.each[child.slot],
    )


def _failure(child: _ParallelChild, finish: Finish) -> FinetuneError:
    """Return the error that the child wrote, as if it had been raised in this process; else one with the end of its log."""
    if child.folder.error.exists():
        return error_of(read_json(child.folder.error))
    return ExecutorError(f"{child.title}: {finish.error_message}")


def _stop(children: Sequence[_ParallelChild], executor: Executor) -> None:
    """Ask the running children to write a checkpoint and stop, and wait until they have ended."""
    handles = [child.handle for child in children if child.handle is not None]
    for handle in handles:
        executor.cancel(handle, grace_seconds=STOP_SECONDS)
    for handle in handles:
        while executor.poll(handle) is None:
            time.sleep(_LOOK_SECONDS)


def _report_progress(children: Sequence[_ParallelChild], progress: ProgressCallback) -> None:
    """Report the progress of every running child whose progress has changed."""
    for child in children:
        if child.handle is None or not child.folder.progress.exists():
            continue
        given = read_json(child.folder.progress)
        update = Progress(**{**given, "message": f"{child.title}: {given['message'] or given['phase']}"})
        if (seen := repr(update)) != child.message:
            child.message = seen
            progress(update)


def _log_tail(folder: RunDir) -> str:
    if not folder.log.exists():
        return "(nothing)"
    return folder.log.read_text(encoding="utf-8", errors="replace")[-_LOG_CHARACTERS:] or "(nothing)"
