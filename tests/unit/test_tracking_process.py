"""Runs are followed by processes of their own: whatever happens to the run or to the tracker, neither harms the other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import mlflow
import pytest
from processes import children_of, command_line
from run_folders import begin_run, end_run, spec_of, train_steps, whole_study
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.storage.files import file_lock, write_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking import follow, process
from finetune.tracking.mirror import read_state
from finetune.tracking.sync import sync_run
from finetune.tracking.tracker import Choice

SECONDS = 240.0  # a bound for a hang, never a wait
TENSORBOARD = Choice("tensorboard")


@contextmanager
def silent_server() -> Iterator[str]:
    """The URL of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {SECONDS:.0f} s"
        time.sleep(0.02)


def followed(
    choices: Sequence[Choice], workspace: Workspace, experiment: str, wait_seconds: float = SECONDS
) -> AbstractContextManager[Callable[[RunDir], None]]:
    """As the product follows runs, but however slow the machine is, what is on its way to the tracker arrives."""
    return process.followed(choices, workspace, experiment, wait_seconds=wait_seconds)


def is_complete(run: RunDir, kind: str) -> bool:
    state = read_state(run, kind)
    return state is not None and state.complete


def run_at(home: Path, name: str = "a") -> RunDir:
    return RunDir(home / "runs" / name)


def killed_while_training(run: RunDir, tracker: str, home: Path) -> None:
    """A process that follows a run, takes three steps, sees that they have arrived, and is killed."""
    program = f"""
import os, signal, sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from run_folders import begin_run, spec_of, train_steps
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking.mirror import read_state
from finetune.tracking.process import followed
from finetune.tracking.tracker import Choice
run = RunDir(Path({str(run.root)!r}))
with followed([Choice({tracker!r})], Workspace.at(Path({str(home)!r})), "flowers") as begun:
    begun(run)
    with run.held():
        begin_run(run, spec_of("full"))
        train_steps(run, range(3))
        while not any(sent.marks.get("train/loss", [0])[0] == 2 for sent in read_state(run, {tracker!r}).runs.values()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=SECONDS)
    assert done.returncode == -signal.SIGKILL


def test_when_the_block_ends_the_tracker_has_everything_and_the_process_is_gone(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    with followed([TENSORBOARD], Workspace.at(tmp_path), "flowers") as begun:
        begun(run)
        resolved = begin_run(run, spec_of("full"))
        train_steps(run, range(3))
        end_run(run, resolved)
    assert is_complete(run, "tensorboard")
    assert list((run.tracking / "tensorboard").glob("events.*"))
    assert not any(line["kind"].startswith("tracking") for line in read_lines(run.events))


def test_without_a_tracker_nothing_is_started_or_written(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    with followed([], Workspace.at(tmp_path), "flowers") as begun:
        begun(run)
    assert not run.root.exists()


def test_the_run_of_a_study_is_left_to_what_follows_the_study(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    whole_study(run)
    child = run.child("full")
    with followed([TENSORBOARD], Workspace.at(tmp_path), "flowers") as begun:
        begun(child)
    assert not child.tracking.exists()


def test_the_death_of_a_run_is_noticed_and_told(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    killed_while_training(run, "tensorboard", tmp_path)
    wait(lambda: is_complete(run, "tensorboard"))
    events = EventAccumulator(str(run.tracking / "tensorboard")).Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [0, 1, 2]
    assert events.Tensors("description/text_summary")[-1].tensor_proto.string_val[0].startswith(b"Stopped before the end")


def test_the_death_of_a_run_is_told_also_when_its_pipe_ends_before_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel closes the files of a killed process one after the other."""
    run = run_at(tmp_path)
    begin_run(run, spec_of("full"))
    reading, writing = os.pipe()
    os.close(writing)
    with ExitStack() as held:
        held.enter_context(file_lock(run.lock))
        looks: list[int] = []

        def parent() -> int:
            looks.append(len(looks))
            if len(looks) == 3:
                held.close()
            return 4711 if len(looks) < 3 else 1

        monkeypatch.setattr(follow.os, "getppid", parent)
        assert follow.follow(run, TENSORBOARD, Workspace.at(tmp_path), "flowers", follow.TrainingProcess(reading, 4711))
    os.close(reading)
    assert is_complete(run, "tensorboard")


@pytest.mark.slow
def test_a_run_that_is_killed_is_closed_as_killed_and_goes_on_in_the_same_mlflow_run(mlflow_workspace: Path) -> None:
    run, workspace = run_at(mlflow_workspace), Workspace.at(mlflow_workspace)
    killed_while_training(run, "mlflow", mlflow_workspace)
    wait(lambda: is_complete(run, "mlflow"))
    client = mlflow.MlflowClient(f"sqlite:///{mlflow_workspace / 'mlflow.db'}")
    run_id = read_state(run, "mlflow").runs["."].id  # type: ignore[union-attr]
    assert client.get_run(run_id).info.status == "KILLED"
    with followed([Choice("mlflow")], workspace, "flowers") as begun:
        begun(run)
        resolved = begin_run(run, spec_of("full"))
        train_steps(run, range(3, 5))
        end_run(run, resolved)
    resumed = client.get_run(run_id)
    assert (resumed.info.status, resumed.data.tags["finetune.attempts"]) == ("FINISHED", "2")
    assert [point.step for point in client.get_metric_history(run_id, "train/loss")] == list(range(5))
    assert len(client.search_runs([resumed.info.experiment_id])) == 1


def test_a_run_that_another_process_goes_on_with_is_not_closed(tmp_path: Path) -> None:
    """The follower of a dead process may live on for a moment when the run is resumed."""
    run = run_at(tmp_path)
    begin_run(run, spec_of("full"))
    with file_lock(run.lock), followed([TENSORBOARD], Workspace.at(tmp_path), "flowers") as begun:
        begun(run)
    state = read_state(run, "tensorboard")
    assert state is not None
    assert not state.complete


def test_a_server_that_never_answers_holds_a_run_up_for_a_bounded_time_and_a_sync_sends_the_rest(mlflow_workspace: Path) -> None:
    run, workspace = run_at(mlflow_workspace), Workspace.at(mlflow_workspace)
    with silent_server() as url, followed([Choice("mlflow", url)], workspace, "flowers", wait_seconds=0.2) as begun:
        begun(run)
        resolved = begin_run(run, spec_of("full"))
        train_steps(run, range(3))
        end_run(run, resolved)
    (told,) = [line for line in read_lines(run.events) if line["kind"] == "tracking_interrupted"]
    assert "finetune mlflow sync" in told["message"]
    assert not is_complete(run, "mlflow")
    assert sync_run(run, Choice("mlflow"), workspace).reason == ""
    assert is_complete(run, "mlflow")


def test_a_tracker_that_cannot_be_written_is_told_once_and_so_is_its_return(tmp_path: Path) -> None:
    run, workspace = run_at(tmp_path), Workspace.at(tmp_path)
    place = tmp_path / "events"
    place.write_text("a file where a folder should be")
    with followed([Choice("tensorboard", str(place))], workspace, "flowers") as begun:
        begun(run)
        resolved = begin_run(run, spec_of("full"))
        wait(lambda: any(line["kind"] == "tracking_interrupted" for line in read_lines(run.events)))
        place.unlink()
        train_steps(run, range(3))
        end_run(run, resolved)
    kinds = [line["kind"] for line in read_lines(run.events) if line["kind"].startswith("tracking")]
    assert kinds == ["tracking_interrupted", "tracking_recovered"]
    assert is_complete(run, "tensorboard")


def test_an_interrupted_run_waits_less_long_and_the_interrupt_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_at(tmp_path)
    end, given = process._Followers.end, []

    def patient_end(self: process._Followers, seconds: float) -> None:
        given.append(seconds)
        end(self, SECONDS)

    monkeypatch.setattr(process._Followers, "end", patient_end)

    def interrupted() -> None:
        with followed([TENSORBOARD], Workspace.at(tmp_path), "flowers") as begun:
            begun(run)
            begin_run(run, spec_of("full"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert given[-1] == process.WAIT_SECONDS_WHEN_STOPPED < process.WAIT_SECONDS
    assert is_complete(run, "tensorboard")


def test_a_run_on_which_two_processes_wait_is_mirrored_by_one_at_a_time(tmp_path: Path) -> None:
    run = run_at(tmp_path)
    begin_run(run, spec_of("full"))
    with file_lock(run.tracking / ".tensorboard.lock"):
        with followed([TENSORBOARD], Workspace.at(tmp_path), "flowers") as begun:
            begun(run)
        assert not list(run.tracking.rglob("events.*"))
        synchronised = sync_run(run, TENSORBOARD, Workspace.at(tmp_path), wait_seconds=0)
        assert "another process" in synchronised.reason
    write_json(run.error, {"code": "x", "message": "y", "problems": []})
    assert sync_run(run, TENSORBOARD, Workspace.at(tmp_path)).reason == ""
    assert list(run.tracking.rglob("events.*"))


def test_the_process_that_follows_is_no_child_of_a_process_group_that_is_ended(tmp_path: Path) -> None:
    """A worker ends a job's whole process group; what is on its way to the tracker must survive that."""
    run = run_at(tmp_path)
    with followed([TENSORBOARD], Workspace.at(tmp_path), "flowers") as begun:
        begun(run)
        found: set[int] = set()

        def has_started() -> bool:
            found.update(pid for pid in children_of(os.getpid()) if b"finetune.tracking.follow" in command_line(pid))
            return bool(found)

        wait(has_started)  # for a moment a new process has no command line
        assert [os.getpgid(pid) == os.getpgid(0) for pid in found] == [False]
