"""What people see: the help of every command, lists, models, and what is said when something is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import click
import numpy as np
import pytest
from diagnosed import N_STEPS, answered, journal, neighbours, resolved, run_records, write_run
from PIL import Image
from screens import FOLDER, Compare, Run
from tiny_bundle import write_tiny_bundle

from finetune import progress_bars
from finetune.bundle.registry import Registry
from finetune.cli import cli
from finetune.progress import Progress, silent
from finetune.runs.estimate import Estimate
from finetune.runs.forecast import Forecast
from finetune.storage.workspace import Workspace
from finetune.studies import plan
from finetune.training.interrupt import Interrupted, StopRequest


def commands(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    """The words of every command and group below this one."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


COMMANDS = list(commands(cli))


@pytest.mark.parametrize("command", [(), *COMMANDS], ids=lambda words: "-".join(words) or "finetune")
def test_help(screen: Run, golden: Compare, command: tuple[str, ...]) -> None:
    shown = screen(*command, "--help")
    assert not [line for line in shown.lines() if line.endswith("...") and not line.startswith("Usage: ")], (
        "the first sentence of a help text fits into a list"
    )
    golden(shown, "-".join(("help", *command)))


def test_every_help_has_its_file_and_no_file_is_left_of_a_command_that_is_gone() -> None:
    assert len(COMMANDS) > 15
    expected = {"-".join(("help", *command)) for command in [(), *COMMANDS]}
    assert {path.stem for path in FOLDER.glob("help*.txt")} == expected


# ── backbones ─────────────────────────────────────────────────────────────────────────────────────


def test_backbones_by_pattern(screen: Run, golden: Compare) -> None:
    golden(screen("backbones", "test_*", "--limit", "5"), "backbones-pattern")


def test_one_backbone(screen: Run, golden: Compare) -> None:
    golden(screen("backbones", "test_resnet"), "backbones-one")


def test_a_backbone_that_is_not_there(screen: Run, golden: Compare) -> None:
    golden(screen("backbones", "resnet51"), "backbones-unknown", wide=True)


# ── models ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def two_versions(screen: Run) -> Run:
    registry = Registry(Path(".finetune").absolute() / "models")
    write_tiny_bundle(Path("bundle"))
    for _ in range(2):
        registry.register(Path("bundle"), "trees")
    return screen


def test_no_models(screen: Run, golden: Compare) -> None:
    golden(screen("models", "list"), "models-none")


def test_two_versions_of_a_model(two_versions: Run, golden: Compare) -> None:
    golden(two_versions("models", "list"), "models-list")


def test_one_model(two_versions: Run, golden: Compare) -> None:
    golden(two_versions("models", "show", "trees@2"), "models-show")


def test_promoting_and_rolling_back(two_versions: Run, golden: Compare) -> None:
    golden(two_versions("models", "promote", "trees", "2"), "models-promote")
    golden(two_versions("models", "rollback", "trees"), "models-rollback")


def test_a_model_that_is_not_there(two_versions: Run, golden: Compare) -> None:
    golden(two_versions("models", "show", "tree"), "models-unknown", wide=True)


def test_predicting(two_versions: Run, golden: Compare) -> None:
    Image.new("RGB", (40, 30), (30, 120, 60)).save("leaf.png")
    golden(two_versions("predict", "leaf.png", "nothing.png", "--model", "trees", "--top-k", "2"), "predict")


# ── checking, training, evaluating ────────────────────────────────────────────────────────────────

TINY = (
    "--model", "test_efficientnet", "--set", "model.weights=none", "--set", "model.input_size_px=64",
    "--set", "compute.threads=1", "--set", "compute.device=cpu",
)  # fmt: skip
FIGURES = ("duration", "size", "figure")


@pytest.fixture
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """How far a bar comes before it is drawn depends on timing."""
    monkeypatch.setattr(progress_bars, "progress_bars", lambda shown: nullcontext(silent))


@pytest.fixture
def colours(screen: Run, _no_bars: None) -> Run:
    """Class folders of coloured noise that any network tells apart, with something odd among them."""
    chance = np.random.default_rng(0)
    for label, name in enumerate(("blue", "green", "red")):
        (Path("colours") / name).mkdir(parents=True)
        for number in range(14):
            pixels = chance.integers(0, 100, (72, 80, 3), dtype=np.uint8)
            pixels[:, :, 2 - label] += 120
            Image.fromarray(pixels).save(Path("colours") / name / f"{number:02d}.png")
    Path("colours/red/notes.txt").write_text("not an image")
    Path("colours/red/broken.png").write_bytes(b"nothing that could be read")
    return screen


def test_the_plan(colours: Run, golden: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Estimate(83.0, 1.2e9, 333_000.0, "130 outputs of blocks.3 (48×4×4 float16, 0.2 MB), all in the cache")
    monkeypatch.setattr(plan, "estimate", lambda built, store, rounds: measured)
    monkeypatch.setattr(plan, "measured_speeds", lambda workspace, question: "known")
    monkeypatch.setattr(plan, "forecast", lambda spec, speeds, images: Forecast(60.0, 100.0, 150.0))
    golden(colours("check", "--data", "colours", "--method", "partial", *TINY), "check-partial")
    golden(colours("check", "--data", "colours", "--folds", "3", *TINY), "check-folds")


@pytest.mark.longer
def test_a_model_is_trained_measured_and_asked(colours: Run, golden: Compare) -> None:
    golden(colours("train", "--data", "colours", *TINY), "train", masks=FIGURES)
    golden(colours("evaluate", "colours", "--data", "colours"), "evaluate-seen", masks=FIGURES)
    shutil.copytree("colours/red", "only/red")
    golden(colours("predict", "colours/red/00.png", "only", "nothing.png", "--top-k", "1"), "predict-folder", masks=FIGURES)
    golden(colours("predict", "only", "--out", "answers.csv"), "predict-table", masks=FIGURES)


@pytest.mark.longer
def test_a_cross_validation(colours: Run, golden: Compare) -> None:
    golden(colours("train", "--data", "colours", "--folds", "3", *TINY), "train-folds", masks=FIGURES)


@pytest.mark.usefixtures("_no_bars")
def test_a_stranger_s_images_are_measured(two_versions: Run, golden: Compare) -> None:
    for name, colour in (("ash", (200, 30, 30)), ("elm", (30, 120, 60))):
        (Path("leaves") / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 30), tuple(value + 9 * number for value in colour)).save(f"leaves/{name}/{number}.png")
    golden(two_versions("evaluate", "trees", "--data", "leaves"), "evaluate-strange", masks=("figure",))


@pytest.mark.longer
def test_a_run_that_is_stopped_says_where_and_goes_on_there(
    colours: Run, golden: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ("train", "--data", "colours", "--method", "full", "--epochs", "2", *TINY, "--set", "hyperparameters.batch_size=10")
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "check", stop_after_three_steps())
        golden(colours(*request), "train-interrupted")
    seen: list[Progress] = []
    monkeypatch.setattr(progress_bars, "progress_bars", lambda shown: nullcontext(seen.append))
    assert colours(*request).exit_code == 0
    assert "going on at step 3" in [update.message for update in seen]


def stop_after_three_steps() -> Callable[[StopRequest], None]:
    """Return a check that stops a run after three batches of the training sample, and three steps."""
    asked = iter(range(1, 8))

    def check(request: StopRequest) -> None:
        if next(asked) == 7:
            raise Interrupted("stopped by SIGINT")

    return check


# ── diagnosing ────────────────────────────────────────────────────────────────────────────────────


def test_a_diagnosis_of_a_run_with_which_nothing_is_wrong(screen: Run, golden: Compare) -> None:
    write_run(Path("run"), run_records())
    golden(screen("diagnose", "run"), "diagnose-healthy")


def test_a_diagnosis_of_a_run_with_a_cause_and_what_follows_from_it(screen: Run, golden: Compare) -> None:
    samples = {0: answered(200, 0.9, sureness=2.0), N_STEPS: answered(200, 0.5)}
    lines = journal(dead={"stage3": (0.0, 0.9)}, val=[(1.0, 0.5)] * 6)
    write_run(Path("run"), run_records(samples=samples, resolved=resolved(rate=0.1), lines=lines, neighbours=neighbours(60)))
    golden(screen("diagnose", "run"), "diagnose-problems")


def test_a_folder_that_cannot_be_diagnosed(screen: Run, golden: Compare) -> None:
    Path("photos").mkdir()
    golden(screen("diagnose", "photos"), "diagnose-no-run", wide=True)


# ── errors ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("unknown-command", ["trian"]),
        ("unknown-option", ["train", "--date", "photos"]),
        ("several-wrong-fields", ["train", "--data", "photos", "--set", "metod.type=full", "--epochs", "-1"]),
        ("no-data", ["train"]),
        ("no-such-folder", ["train", "--data", "photos", "--model", "test_resnet", "--set", "model.weights=none"]),
        ("nothing-to-predict-with", ["predict", "x.jpg"]),
    ],
)  # fmt: skip
def test_an_error(screen: Run, golden: Compare, name: str, arguments: list[str]) -> None:
    golden(screen(*arguments), f"error-{name}", wide=True)
    assert not Workspace.from_environment().runs.exists()  # nothing begins where nothing can
