"""Runs that go wrong in the ways that users report: each ends in a model with its doubts told, or in one sentence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_runs import carry_out_at, shared_at, tiny_spec, workspace_at, write_stripes

from finetune.bundle.registry import Registry
from finetune.errors import DataChangedError, NoBetterThanChance, SpecError
from finetune.evaluation.predictions import read
from finetune.runs.build import BuiltNetwork
from finetune.runs.options import RunOptions
from finetune.runs.outcome import Outcome
from finetune.runs.prepare import prepare
from finetune.spec import ExportSpec, JobSpec
from finetune.storage.files import read_json, write_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.studies.carry_out import fine_tune
from finetune.training import checkpoint

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FULL = {"method": "full", "hyperparameters": {"n_epochs": 1, "batch_size": 8}}


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("pictures"), 45)


@pytest.fixture
def pictures(stripes: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(stripes, tmp_path / "stripes"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


class Killed(BaseException):
    """Stands for the death of the process: nothing catches it."""


def killed_after(attempt: Callable[[], object], checkpoints: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an attempt that dies once it has written so many checkpoints."""
    save, written = checkpoint.save, []

    def dying(folder: Path, step: int, content: Any) -> None:
        save(folder, step, content)
        written.append(step)
        if len(written) == checkpoints:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dying)
        with pytest.raises(Killed):
            attempt()


# ── attempts ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("study", [False, True], ids=["a run", "a study"])
def test_what_a_run_costs_is_what_all_attempts_cost(
    study: bool, pictures: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**FULL, "hyperparameters": {**FULL["hyperparameters"], "refit": study}}
    spec, run = tiny_spec(pictures, **given), RunDir(home / "runs" / "killed")
    killed_after(lambda: carry_out_at(home, spec, run), 2, monkeypatch)
    spent = read_json(run.cost)
    assert spent["wall_seconds"] > 0
    assert spent["cpu_seconds"] > 0
    # as if the attempt had taken an hour of two cores and all the memory that there is
    write_json(run.cost, {"wall_seconds": 3600.0, "cpu_seconds": 7200.0, "peak_memory_bytes": 2.0**50})
    outcome = carry_out_at(home, spec, run)
    assert 3600 < outcome.cost["wall_seconds"] < 7200
    assert outcome.cost["cpu_seconds"] > 7200
    assert outcome.cost["peak_memory_bytes"] == 2.0**50
    assert Outcome.read(run).cost == outcome.cost
    (final,) = [line["values"] for line in read_lines(run.metrics) if "cost/wall_seconds" in line["values"]][-1:]
    assert final["cost/wall_seconds"] == outcome.cost["wall_seconds"]


def test_another_seed_trains_otherwise_on_the_same_images(pictures: Path, home: Path) -> None:
    splits, weights = [], []
    for seed in (0, 1):
        run = RunDir(home / "runs" / str(seed)).create()
        network = prepare(tiny_spec(pictures, seed=seed), shared_at(home), run=run).network
        assert isinstance(network, BuiltNetwork)
        splits.append(run.split.read_bytes())
        weights.append(network.fresh_classifier(seed).head.weight.detach().numpy())
    assert splits[0] == splits[1]
    assert not np.array_equal(weights[0], weights[1])
    other = RunDir(home / "runs" / "split").create()
    prepare(tiny_spec(pictures, data={"split_seed": 1}), shared_at(home), run=other)
    assert other.split.read_bytes() != splits[0]


# ── data that changes ─────────────────────────────────────────────────────────────────────────────


def add_a_picture(pictures: Path) -> None:
    Image.fromarray(np.full((70, 70, 3), 77, np.uint8)).save(pictures / "class0" / "new.png")


def test_data_that_changed_after_an_interruption_makes_a_new_run_and_says_so(
    pictures: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec(pictures, **FULL)
    killed_after(lambda: fine_tune(spec, shared_at(home)), 2, monkeypatch)
    (interrupted,) = workspace_at(home).runs.iterdir()
    before = {path: path.read_bytes() for path in (interrupted / "checkpoints").iterdir()}
    add_a_picture(pictures)
    outcome = fine_tune(spec, shared_at(home))
    assert outcome.run == interrupted.with_name(f"{interrupted.name}-2")
    assert outcome.n_train + sum(len(read(RunDir(outcome.run).predictions_of(split))) for split in ("val", "test")) == 46
    (said,) = [warning for warning in outcome.warnings if "new run" in warning]
    assert said == (
        f"this is a new run: the data has changed since {interrupted} was interrupted "
        "(1 file, the first: class0/new.png: is in the dataset, but not in the recorded split)"
    )
    assert [line["message"] for line in read_lines(RunDir(outcome.run).events) if line["kind"] == "data_changed"] == [said]
    assert {path: path.read_bytes() for path in (interrupted / "checkpoints").iterdir()} == before, "the old run stays"
    (pictures / "class0" / "new.png").unlink()
    resumed = fine_tune(spec, shared_at(home))
    assert resumed.run == interrupted, "with the data as it was, the old run goes on"
    assert [line["kind"] for line in read_lines(RunDir(interrupted).events)].count("resumed") == 1


def test_in_a_folder_that_was_asked_for_the_error_names_the_way_out(
    pictures: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = tiny_spec(pictures, **FULL), home / "mine"
    killed_after(lambda: fine_tune(spec, shared_at(home), run_dir=folder), 2, monkeypatch)
    add_a_picture(pictures)
    with pytest.raises(DataChangedError, match=r"Give another --run-dir \(or delete this one\)") as caught:
        fine_tune(spec, shared_at(home), run_dir=folder)
    assert [str(problem) for problem in caught.value.problems] == [
        "class0/new.png: is in the dataset, but not in the recorded split"
    ]
    assert read_json(RunDir(folder).error)["code"] == "data_changed"
    fine_tune(spec, shared_at(home), run_dir=home / "another")


# ── models that learnt nothing ────────────────────────────────────────────────────────────────────


def without_sense(pictures: Path) -> JobSpec:
    """Steps so large that the weights run away while the loss stays finite."""
    return tiny_spec(
        pictures,
        method={"type": "full", "warm_head": False},
        hyperparameters={"n_epochs": 2, "batch_size": 8, "learning_rate": 10, "ema": False},
        model={"backbone": "test_resnet", "weights": "none", "input_size_px": 64},
    )


@pytest.mark.longer
def test_weights_that_run_away_end_the_run_in_one_sentence_and_nothing_is_registered(pictures: Path, home: Path) -> None:
    run = RunDir(home / "runs" / "diverged")
    with pytest.raises(NoBetterThanChance, match=r"its loss on the \d+ test images is .* so training diverged.*multiplier: 0\.1"):
        carry_out_at(home, without_sense(pictures), run)
    assert not run.outcome.exists()
    assert not run.bundle.exists()
    assert not Registry(workspace_at(home).models).list()
    assert read_json(run.error)["code"] == "no_better_than_chance"
    assert run.evaluation.exists(), "the figures that say so are there"
    assert [line["kind"] for line in read_lines(run.events)][-1] == "failed"
    insisting = without_sense(pictures).model_copy(update={"export": ExportSpec(register_model="always")})
    outcome = carry_out_at(home, insisting, RunDir(home / "runs" / "always"))
    assert len([warning for warning in outcome.warnings if warning.endswith("so training diverged")]) == 1


@pytest.mark.longer
def test_whoever_insists_gets_a_version_with_the_doubt_beside_it(pictures: Path, home: Path) -> None:
    """Labels that have nothing to do with the pictures, and test images enough to tell."""
    chance = np.random.default_rng(0)
    noise = home / "noise"
    for number in range(150):
        (noise / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (70, 70, 3), dtype=np.uint8)).save(noise / f"class{number % 2}" / f"{number}.png")
    given: dict[str, Any] = {"data": {"test_fraction": 0.4}, "hyperparameters": {"l2": 1e6}}  # l2: one answer to all
    with pytest.raises(NoBetterThanChance, match=r"one prediction for all of them has 0\.\d+"):
        carry_out_at(home, tiny_spec(noise, **given), RunDir(home / "runs" / "refused"))
    registry = Registry(workspace_at(home).models)
    assert not registry.list()
    insisting = tiny_spec(noise, **given, export={"register_model": "always"})
    outcome = carry_out_at(home, insisting, RunDir(home / "runs" / "always"))
    assert (outcome.model, outcome.version) == ("noise", "1")
    assert [version.version for version in registry.list()] == ["1"]
    assert any(warning.startswith("registered without proof that it is better than chance") for warning in outcome.warnings)


def test_a_batch_of_one_cannot_train_batch_normalisation_and_that_is_said_before_training(pictures: Path, home: Path) -> None:
    for bn in ("train", "recalibrate"):
        spec = tiny_spec(pictures, method={"type": "full", "bn": bn}, hyperparameters={"batch_size": 1, "n_epochs": 1})
        with pytest.raises(SpecError, match=rf"batch_size: 1 is given with method\.bn: {bn}.* at least 2, or method\.bn: frozen"):
            prepare(spec, shared_at(home))
    prepare(tiny_spec(pictures, method="full", hyperparameters={"batch_size": 1, "n_epochs": 1}), shared_at(home))


# ── figures that say less than they seem to ───────────────────────────────────────────────────────


def test_a_class_that_no_test_image_shows_is_named_and_left_out_of_the_means(pictures: Path, home: Path) -> None:
    for path in sorted((pictures / "class2").iterdir())[2:]:
        path.unlink()
    run = RunDir(home / "runs" / "rare")
    outcome = carry_out_at(home, tiny_spec(pictures), run)
    assert "test: no images of 1 class, which it cannot measure: class2" in outcome.warnings
    assert [line["message"] for line in read_lines(run.events) if line["kind"] == "warning"] == list(outcome.warnings)
    report = run.report.read_text()
    assert "test has no image of class2; the means over classes leave them out" in report
    assert "mean over 2 classes" in report


# ── names ─────────────────────────────────────────────────────────────────────────────────────────


def test_folders_named_in_other_scripts_become_models_of_their_own(pictures: Path, home: Path) -> None:
    names = set()
    for folder in ("照片", "данные"):
        shutil.copytree(pictures, home.parent / folder)
        outcome = fine_tune(tiny_spec(home.parent / folder), shared_at(home))
        assert outcome.version == "1"
        names.add(outcome.model)
    assert len(names) == 2
    assert {version.name for version in Registry(workspace_at(home).models).list()} == names


def test_file_names_of_any_bytes_are_trained_on_shown_and_quarantined(pictures: Path, home: Path) -> None:
    """Latin-1 names of an old disk: with mistakes in the report and unreadable files to name."""
    for number, path in enumerate(sorted(pictures.rglob("*.png"))):
        path.rename(path.with_name(os.fsdecode(b"caf\xe9 %03d.png" % number)))
    moved = next((pictures / "class0").iterdir())
    broken = next((pictures / "class1").iterdir())
    moved.rename(pictures / "class2" / moved.name)
    broken.write_bytes(b"not an image")
    run = RunDir(home / "runs" / "latin1")
    outcome = carry_out_at(home, tiny_spec(pictures, data={"max_bad_fraction": 0.5}, hyperparameters={"l2": 1e6}), run)
    assert outcome.quarantined == 1
    report = run.report.read_bytes().decode("utf-8")
    assert "caf\\xe9 0" in report, "bytes that are no UTF-8 are shown as escapes"
    assert "\\udce9" not in report
    table = read(run.predictions_of("test"))
    assert all(name.startswith("class") and "caf\\xe9 " in name for name in table.ids), "and so are they where programs read"
    again = RunOptions.read(run)
    assert again.goal == "registered"
    assert Outcome.read(run) == outcome
