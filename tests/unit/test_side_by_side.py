"""Runs of a study in processes: as many at once as there are places, started again when they die, stopped together."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import workspace_at

from finetune.errors import DataError, ExecutorError, FinetuneError, NoBetterThanChance, Problem, error_of
from finetune.executors import Handle, Resources
from finetune.executors.executor import EXIT_BUSY
from finetune.executors.slots import Slots
from finetune.progress import Progress, silent
from finetune.runs.outcome import Outcome
from finetune.spec import parse_spec
from finetune.storage.files import write_json
from finetune.storage.rundir import RunDir
from finetune.studies import side_by_side
from finetune.studies.side_by_side import run_side_by_side

SPEC = parse_spec({"training_file": "."})
MEANT = Outcome(Path("run"), "full", "full", "judged", {"val/top1": 0.5}, {"wall_seconds": 1.0}, "done", ("a", "b"), 8, (), 0)

End = Callable[[RunDir], int]


def succeeds(run: RunDir) -> int:
    MEANT.write(run)
    return 0


def busy(run: RunDir) -> int:
    return EXIT_BUSY


def finds_bad_data(run: RunDir) -> int:
    write_json(run.error, {"code": "invalid_data", "message": "no images", "problems": [{"where": "a", "message": "empty"}]})
    return 2


def dies(run: RunDir) -> int:
    return -signal.SIGSEGV


@dataclass
class Standin:
    """An executor whose processes end as they are told, each at its second look."""

    ends: Mapping[str, list[End]]
    started: list[tuple[str, Resources]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    most_at_once: int = 0
    _alive: dict[str, tuple[RunDir, int]] = field(default_factory=dict)

    def start(
        self, job_id: str, command: Sequence[str], *, fence: int, environment: Any, log: Path, resources: Resources
    ) -> Handle:
        run = RunDir(log.parent)
        handle = Handle(job_id, f"{run.name}-{fence}")
        self.started.append((run.name, resources))
        self._alive[handle.reference] = (run, 0)
        self.most_at_once = max(self.most_at_once, len(self._alive))
        return handle

    def poll(self, handle: Handle) -> int | None:
        run, looks = self._alive[handle.reference]
        ends = self.ends.get(run.name, [succeeds])
        if handle.reference in self.cancelled:
            del self._alive[handle.reference]
            return -signal.SIGTERM
        if looks == 0 or not ends:
            self._alive[handle.reference] = (run, looks + 1)
            return None
        del self._alive[handle.reference]
        return (ends.pop(0) if len(ends) > 1 else ends[0])(run)

    def cancel(self, handle: Handle, *, grace_seconds: float) -> None:
        self.cancelled.append(handle.reference)


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr("finetune.executors.endings.BUSY_SECONDS", 0.0)
    monkeypatch.setattr("finetune.studies.side_by_side.RETRY_SECONDS", 0.0)


def carry_out(executor: Standin, home: Path, names: Sequence[str], slots: int = 2, progress: Any = silent) -> list[int]:
    children = [(name, SPEC, RunDir(home / "runs" / "study" / "runs" / name).create()) for name in names]
    places = Slots(executor, tuple(Resources(1, (slot,)) for slot in range(slots)))
    return [number for number, _ in run_side_by_side(children, places, workspace_at(home), progress)]


def test_as_many_go_on_at_once_as_there_are_places_and_each_has_its_own(tmp_path: Path) -> None:
    executor = Standin({})
    finished = carry_out(executor, tmp_path, "abcde")
    assert sorted(finished) == [0, 1, 2, 3, 4]
    assert executor.most_at_once == 2
    assert {gpus for _, resources in executor.started for gpus in resources.gpus} == {0, 1}
    spec = (tmp_path / "runs/study/runs/a/spec.yaml").read_text()
    assert parse_spec({"training_file": "."}).with_absolute_paths().to_yaml() == spec, "what another folder can read"


def test_a_process_that_could_not_begin_or_died_is_started_again(tmp_path: Path) -> None:
    executor = Standin({"a": [busy, dies, succeeds]})
    assert sorted(carry_out(executor, tmp_path, "ab")) == [0, 1]
    assert [name for name, _ in executor.started].count("a") == 3


def test_an_error_of_one_child_is_raised_as_its_own_and_the_others_are_stopped(tmp_path: Path) -> None:
    executor = Standin({"a": [finds_bad_data], "b": []})
    with pytest.raises(DataError, match="no images") as caught:
        carry_out(executor, tmp_path, "ab")
    assert caught.value.problems == (Problem("a", "empty"),)
    assert [reference.partition("-")[0] for reference in executor.cancelled] == ["b"]


def test_a_child_that_dies_again_and_again_ends_the_study_with_the_end_of_its_log(tmp_path: Path) -> None:
    executor = Standin({"a": [dies]})
    (tmp_path / "runs/study/runs/a").mkdir(parents=True)
    (tmp_path / "runs/study/runs/a/log.txt").write_text("Fatal Python error: Segmentation fault\n")
    with pytest.raises(ExecutorError, match=r"a: .*signal 11.*3 times in a row(.|\n)*Segmentation fault"):
        carry_out(executor, tmp_path, "a")


def test_asked_to_stop_every_child_is_stopped(tmp_path: Path) -> None:
    executor = Standin({"a": [], "b": []})

    def interrupting(_: Progress) -> None:
        raise KeyboardInterrupt

    for name in "ab":
        run = RunDir(tmp_path / "runs" / "study" / "runs" / name).create()
        write_json(run.progress, {"phase": "training", "done": 1, "total": 2, "unit": "steps", "values": {}, "message": ""})
    with pytest.raises(KeyboardInterrupt):
        carry_out(executor, tmp_path, "ab", progress=interrupting)
    assert sorted(reference.partition("-")[0] for reference in executor.cancelled) == ["a", "b"]


def test_progress_of_all_children_is_passed_on_under_their_titles(tmp_path: Path) -> None:
    seen: list[Progress] = []
    for name in "ab":
        run = RunDir(tmp_path / "runs" / "study" / "runs" / name).create()
        write_json(run.progress, {"phase": "training", "done": 1, "total": 2, "unit": "steps", "values": {}, "message": ""})
    carry_out(Standin({}), tmp_path, "ab", progress=seen.append)
    assert [update.message for update in seen] == ["a: training", "b: training"], "each once: neither moved"


def test_an_error_that_was_written_down_comes_back_as_its_class() -> None:
    assert type(error_of({"code": "no_better_than_chance", "message": "m"})) is NoBetterThanChance
    unknown = error_of({"code": "of a newer version", "message": "m"})
    assert (type(unknown), unknown.message) == (FinetuneError, "m")
