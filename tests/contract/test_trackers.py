"""What every tracker owes a run folder: all of it, once, whatever happened in between. One suite for all trackers."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from run_folders import begin_run, end_run, spec_of, train_steps, whole_comparison, whole_run, whole_study

from finetune.errors import InvalidInput, MissingExtra
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.tracking import tensorboard
from finetune.tracking.mirror import Mirror, read_state
from finetune.tracking.tracker import TRACKERS, Choice, Place, Point, choose, open_tracker, parse_choice
from finetune.tracking.view import read_view

Course = list[tuple[int, float]]  # steps and values
LOSS = [(step, 1 / (step + 1)) for step in range(3)]


@dataclass(frozen=True)
class Reader:
    """Reads back what a tracker has, the way its users do."""

    course: Callable[[str, str], Course]  # run id, name of a metric in metrics.jsonl
    final: Callable[[str, str], float]  # run id, name of a figure
    params: Callable[[str], Mapping[str, str]]
    description: Callable[[str], str]
    delete: Callable[[str], object]


def mlflow_reader(home: Path) -> Reader:
    from mlflow import MlflowClient

    from finetune.tracking.mlflow.names import metric_key

    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    return Reader(
        course=lambda run, key: [(p.step, p.value) for p in client.get_metric_history(run, str(metric_key(key)))],
        final=lambda run, key: client.get_run(run).data.metrics[key],
        params=lambda run: client.get_run(run).data.params,
        description=lambda run: client.get_run(run).data.tags["mlflow.note.content"],
        delete=client.delete_run,
    )


def tensorboard_reader(home: Path) -> Reader:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    def events(run: str) -> Any:
        found = EventAccumulator(run, size_guidance={"scalars": 0, "tensors": 0})
        return found.Reload()

    def params(run: str) -> Mapping[str, str]:
        content = events(run).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        values = HParamsPluginData.FromString(content).session_start_info.hparams
        return {key: value.string_value or f"{value.number_value:g}" for key, value in values.items()}

    return Reader(
        course=lambda run, key: [(p.step, p.value) for p in events(run).Scalars(key)],
        final=lambda run, key: events(run).Scalars(f"final/{key}")[-1].value,
        params=params,
        description=lambda run: events(run).Tensors("description/text_summary")[-1].tensor_proto.string_val[0].decode(),
        delete=shutil.rmtree,
    )


READERS = {"mlflow": mlflow_reader, "tensorboard": tensorboard_reader}


@dataclass(frozen=True)
class Setting:
    """A workspace, a tracker of it, and what reads that tracker."""

    workspace: Workspace
    choice: Choice
    reader: Reader

    def run(self, name: str = "a") -> RunDir:
        return RunDir(self.workspace.runs / name)

    def update(self, run: RunDir, **how: Any) -> str:
        """As a process that follows or synchronises the run, and ends then; why something is missing."""
        return Mirror(run, self.choice, self.workspace, "flowers").update(**{"alive": False, **how})

    def id(self, run: RunDir, name: str = ".") -> str:
        state = read_state(run, self.choice.kind)
        assert state is not None
        run_id = state.runs[name].id
        assert run_id is not None
        return run_id


@pytest.fixture(params=sorted(TRACKERS))
def setting(request: pytest.FixtureRequest, mlflow_workspace: Path) -> Setting:
    kind = request.param
    return Setting(Workspace.at(mlflow_workspace), Choice(kind), READERS[kind](mlflow_workspace))


def test_everything_of_a_finished_run_is_there(setting: Setting) -> None:
    run = setting.run()
    whole_run(run, top1=0.875)
    assert setting.update(run) == ""
    run_id, reader = setting.id(run), setting.reader
    assert reader.course(run_id, "train/loss") == [(step, pytest.approx(value)) for step, value in LOSS]
    assert reader.course(run_id, "val/top1") == [(step, pytest.approx(step / 10)) for step in range(3)]
    assert reader.final(run_id, "test/top1") == 0.875
    params = reader.params(run_id)
    assert (params["method"], params["backbone"], params["seed"]) == ("full", "resnet18", "0")
    assert "top-1 accuracy 87.5%** on 14 test images" in reader.description(run_id)


def test_a_run_is_followed_while_it_goes_on_and_each_point_arrives_once(setting: Setting) -> None:
    run = setting.run()
    resolved = begin_run(run, spec_of("full"))
    mirror = Mirror(run, setting.choice, setting.workspace, "flowers")
    for step in range(3):
        train_steps(run, range(step, step + 1))
        assert mirror.update(alive=True) == ""
        assert mirror.update(alive=True) == ""
        assert [at for at, _ in setting.reader.course(setting.id(run), "train/loss")] == list(range(step + 1))
    end_run(run, resolved, top1=0.75)
    assert mirror.update(alive=False) == ""
    assert mirror.state.complete
    assert setting.reader.final(setting.id(run), "test/top1") == 0.75
    assert len(setting.reader.course(setting.id(run), "train/loss")) == 3


def test_mirroring_again_changes_nothing(setting: Setting) -> None:
    run = setting.run()
    whole_run(run)
    assert setting.update(run) == ""
    run_id = setting.id(run)
    for thorough in (False, True):
        assert setting.update(run, thorough=thorough) == ""
    assert setting.id(run) == run_id
    assert [step for step, _ in setting.reader.course(run_id, "train/loss")] == [0, 1, 2]


def test_a_run_that_was_killed_and_goes_back_to_its_checkpoint_goes_on_in_the_same_place(setting: Setting) -> None:
    run = setting.run()
    resolved = begin_run(run, spec_of("full"))
    train_steps(run, range(5))
    assert setting.update(run, alive=True) == ""  # and its process is killed: the next update is another's
    first = setting.id(run)
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(lines[:3]))
    train_steps(run, range(3, 7), speed=50.0)  # computed again at another time and another speed
    end_run(run, resolved)
    assert setting.update(run) == ""
    assert setting.id(run) == first
    for name in ("train/loss", "train/images_per_second", "val/top1"):
        assert [step for step, _ in setting.reader.course(first, name)] == list(range(7)), name
    assert len(setting.reader.course(first, "train/loss")) == 7


def test_what_the_journal_holds_besides_numbers_and_whole_lines_does_no_harm(setting: Setting) -> None:
    run = setting.run()
    resolved = begin_run(run, spec_of("full"))
    run.metric(1, {"train/loss": math.nan})
    end_run(run, resolved)
    with open(run.metrics, "a") as torn:
        torn.write('{"at": 1, "step": 9999, "val')
    assert setting.update(run) == ""
    ((step, value),) = setting.reader.course(setting.id(run), "train/loss")
    assert step == 1
    assert math.isnan(value)


def test_the_runs_of_a_study_are_runs_of_their_own(setting: Setting) -> None:
    run = setting.run("study")
    whole_study(run, methods={"linear_probe": 0.75, "full": 0.875})
    assert setting.update(run) == ""
    ids = {name: setting.id(run, name) for name in (".", "runs/linear_probe", "runs/full")}
    assert len(set(ids.values())) == 3
    finals = {name: setting.reader.final(run_id, "test/top1") for name, run_id in ids.items()}
    assert finals == {".": 0.875, "runs/linear_probe": 0.75, "runs/full": 0.875}
    assert setting.reader.params(ids["runs/linear_probe"])["method"] == "linear_probe"
    assert "| full | full | test top-1 accuracy 87.5% |" in setting.reader.description(ids["."])


def test_a_comparison_says_its_verdict(setting: Setting) -> None:
    run = setting.run("comparison")
    whole_comparison(run)
    assert setting.update(run) == ""
    assert len({sent.id for sent in read_state(run, setting.choice.kind).runs.values()}) == 5  # type: ignore[union-attr]
    assert setting.reader.description(setting.id(run)).startswith("**full is better than linear_probe by 10 points.**")
    assert setting.reader.final(setting.id(run), "test/top1") == pytest.approx(0.9)  # of the arm that it chose


def test_a_run_that_was_deleted_there_is_there_again_with_everything(setting: Setting) -> None:
    run = setting.run()
    whole_run(run)
    assert setting.update(run) == ""
    setting.reader.delete(setting.id(run))
    assert setting.update(run, thorough=True) == ""
    assert [step for step, _ in setting.reader.course(setting.id(run), "train/loss")] == [0, 1, 2]
    assert "top-1" in setting.reader.description(setting.id(run))


def test_a_process_that_died_before_it_could_note_the_run_leaves_no_second_one(setting: Setting) -> None:
    run = setting.run()
    whole_run(run)
    mirror = Mirror(run, setting.choice, setting.workspace, "flowers")
    assert mirror.update(alive=False) == ""
    for sent in mirror.state.runs.values():
        sent.marks, sent.id = {}, None
    first = setting.id(run)
    assert mirror.update(alive=False, thorough=True) == ""
    assert setting.id(run) == first
    assert [step for step, _ in setting.reader.course(first, "train/loss")] == [0, 1, 2]


def test_a_long_journal_arrives_whole(setting: Setting) -> None:
    run = setting.run()
    resolved = begin_run(run, spec_of("full"))
    for step in range(1100):
        run.metric(step, {"train/loss": float(step)})
    end_run(run, resolved)
    assert setting.update(run) == ""
    assert setting.reader.course(setting.id(run), "train/loss") == [(step, float(step)) for step in range(1100)]


def test_a_failing_part_keeps_nothing_else_back(setting: Setting) -> None:
    run = setting.run()
    whole_run(run)
    mirror = Mirror(run, setting.choice, setting.workspace, "flowers")
    tracker = open_tracker(setting.choice, setting.workspace)

    def fail(*_given: object) -> None:
        raise RuntimeError("a bug in a plugin of https://me:secret@tracker.example")

    tracker.figures = fail  # type: ignore[method-assign]
    mirror._tracker = tracker
    reason = mirror.update(alive=False)
    assert reason == "RuntimeError: a bug in a plugin of https://***@tracker.example"
    assert not mirror.state.complete
    assert len(setting.reader.course(setting.id(run), "train/loss")) == 3
    assert "top-1" in setting.reader.description(setting.id(run))
    assert setting.update(run) == ""
    assert setting.reader.final(setting.id(run), "test/top1") == pytest.approx(0.9)


def test_no_call_needs_another_one_than_begin_before_it(setting: Setting) -> None:
    """The protocol itself: whatever the mirror leaves out because it is there already."""
    run = setting.run()
    whole_run(run)
    view = read_view(run, alive=False)
    for number, call in enumerate(("facts", "points", "figures", "file", "model", "sample", "flush")):
        tracker = open_tracker(setting.choice, setting.workspace)
        run_id, is_new = tracker.begin(view, Place("flowers", run.root, key=f"{number:032x}"))
        assert is_new
        arguments = {
            "facts": (run_id, view, "text"),
            "points": (run_id, [Point("train/loss", 1.0, 1.0, 0, None)]),
            "figures": (run_id, view, None),
            "file": (run_id, run.report, "report.html"),
            "sample": (run_id, view),
            "flush": (),
        }
        if call != "model":
            getattr(tracker, call)(*arguments[call])
        tracker.flush()


def test_a_tracker_is_chosen_by_its_name_and_a_place(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = setting.choice.kind
    assert parse_choice(kind) == Choice(kind)
    assert choose([f"{kind}=somewhere"]) == [Choice(kind, "somewhere")]
    assert choose(None, environment={"FINETUNE_TRACKERS": f"{kind} none"}) == [Choice(kind)]
    assert choose([kind], without=[kind]) == []
    assert str(Choice(kind, "somewhere")) == f"{kind}=somewhere"
    monkeypatch.setattr("finetune.tracking.tracker.is_installed", lambda _: False)
    with pytest.raises(MissingExtra, match=f"--tracker {kind} needs {kind}: pip install 'finetune-images"):
        choose([kind])
    assert choose(None, environment={}) == []


def test_what_is_no_tracker_is_told() -> None:
    assert choose(None, environment={}) == [Choice("mlflow")]
    assert choose(["none"]) == choose([]) == []
    with pytest.raises(InvalidInput, match=r"trackers are mlflow, tensorboard, none.*Did you mean"):
        choose(["tensorbord"])


def test_what_decides_to_follow_imports_no_tracker() -> None:
    program = (
        "import sys, finetune.tracking.process, finetune.tracking.mirror, finetune.tracking.sync, finetune.cli.training\n"
        "sys.exit(str([m for m in ('mlflow', 'tensorboard', 'torch', 'pandas') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=240)
    assert done.stderr.strip() == "[]"


def test_the_event_file_of_a_later_process_is_read_after_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events.out.tfevents.0000000100.host.7.9.abc").touch()
    now = [100.2]
    monkeypatch.setattr(tensorboard.time, "time", lambda: now[0])
    monkeypatch.setattr(tensorboard.time, "sleep", lambda seconds: now.append(now.pop() + 10 * seconds))
    tensorboard._wait_for_a_later_name(tmp_path)
    assert now[0] >= 101
    tensorboard._wait_for_a_later_name(tmp_path)
    assert now[0] < 102, "a later second has come already"
