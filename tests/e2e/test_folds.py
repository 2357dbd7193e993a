"""A job with folds, from a folder of pictures to a registered model: every image tested once, and no fold done twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from finetune.evaluation.metrics import evaluate_logits, read_evaluations
from finetune.outcome import Outcome
from finetune.pipeline import run_job
from folders import path_of
from onnx import numpy_helper
from tiny_training import write_images

from finetune.bundle.manifest import read_manifest
from finetune.cli import cli
from finetune.errors import DataError
from finetune.evaluation.folds import POOLED
from finetune.progress import Progress, silent
from finetune.spec import JobSpec, parse_spec
from finetune.storage.files import read_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.train import checkpoint

CRASHING = Path(__file__).parents[1] / "crashing"
TINY = {
    "model": {"backbone": "test_efficientnet", "weights": "none", "input_size_px": 64},
    "compute": {"device": "cpu", "precision": "float32", "threads": 1},
}
STEPPED = {
    "method": {"type": "full", "warm_head": False, "bn": "train"},
    "hyperparameters": {"n_epochs": 1, "batch_size": 4, "mixup": 0.2},
    "data": {"folds": 2},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace that the tests share: what does not depend on a run is computed once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _in_workspace(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(home))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for sample in write_images(folder / "all", 30):
        (folder / "stripes" / f"class{sample.target}").mkdir(parents=True, exist_ok=True)
        shutil.move(path_of(sample), folder / "stripes" / f"class{sample.target}")
    return folder / "stripes"


def spec_of(pictures: Path, **given: Any) -> JobSpec:
    return parse_spec({"training_file": str(pictures), **TINY, **given})


def weights_of(run: RunDir) -> str:
    """sha256 of the exported weights."""
    digest = hashlib.sha256()
    for tensor in sorted(onnx.load(str(run.bundle / "model.onnx")).graph.initializer, key=lambda one: one.name):
        digest.update(tensor.name.encode() + numpy_helper.to_array(tensor).tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def cross_validated(pictures: Path, home: Path) -> tuple[Outcome, RunDir, list[Progress]]:
    run, seen = RunDir(home / "runs" / "probe"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_HOME", str(home))
        outcome = run_job(spec_of(pictures, data={"folds": 3}), run, Workspace.at(home), seen.append, tracked=False)
    return outcome, run, seen


def read_split(path: Path) -> dict[str, str]:
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    return {name: split for name, _, split, _ in rows}


def test_every_image_is_tested_by_the_one_fold_that_did_not_train_on_it(cross_validated: Any) -> None:
    outcome, run, _ = cross_validated
    splits = [read_split(run.fold(number).split) for number in (1, 2, 3)]
    tested = Counter(name for split in splits for name, side in split.items() if side == "test")
    assert set(tested.values()) == {1}
    assert len(tested) == 30
    assert all({"train", "val", "test"} == set(split.values()) for split in splits)
    assert set(read_split(run.split).values()) == {"train", "val"}, "the final model is not tested by images kept back"
    assert "test/top1" not in outcome.metrics


def test_the_pooled_figures_are_those_of_all_held_out_answers(cross_validated: Any, pictures: Path) -> None:
    outcome, run, _ = cross_validated
    logits, labels = [], []
    for number in (1, 2, 3):
        split = read_split(run.fold(number).split)
        labels += [int(name[5]) for name, side in split.items() if side == "test"]
        logits.append(np.load(run.fold(number).held_out))
        own = read_json(run.fold(number).outcome)
        assert own["metrics"]["test/top1"] == read_evaluations(run.fold(number).evaluation)["test"].top1
    pooled = evaluate_logits(np.concatenate(logits), np.array(labels), ("class0", "class1", "class2"))
    assert read_evaluations(run.evaluation)[POOLED] == pooled
    assert outcome.metrics["cv/top1"] == pooled.top1
    assert outcome.cross_validation == read_json(run.folds)
    assert Outcome.read(run) == outcome
    assert [fold["n_train"] + fold["n_test"] for fold in outcome.cross_validation["folds"]] == [30, 30, 30]


def test_the_final_model_is_fitted_on_every_image_and_says_what_its_figures_are_of(cross_validated: Any, pictures: Path) -> None:
    outcome, run, seen = cross_validated
    assert "once more on train + val" in outcome.summary
    manifest = read_manifest(outcome.bundle)
    assert manifest.metrics["cv/top1"] == outcome.metrics["cv/top1"]
    assert any("had not seen it" in note for note in manifest.method["notes"])
    report = run.report.read_text(encoding="utf-8")
    assert "Cross-validation" in report
    assert "Expect a top-1 of" in report
    assert any(update.message.startswith("fold 2 of 3: ") for update in seen)
    (event,) = [line for line in read_lines(run.events) if line["kind"] == "refitted"]
    assert "the 30 images" in event["message"]
    assert not any(run.fold(number).bundle.exists() for number in (1, 2, 3)), "folds export nothing"


class Killed(BaseException):
    """Stands for the death of the process: nothing catches it."""


def test_a_job_that_dies_amid_its_second_fold_goes_on_there_and_ends_with_the_same_bits(
    pictures: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(pictures, **STEPPED)
    whole, killed = RunDir(home / "runs" / "whole"), RunDir(home / "runs" / "killed")
    expected = run_job(spec, whole, Workspace.at(home), silent, tracked=False)
    save = checkpoint.save

    def dying(folder: Path, step: int, content: Any) -> None:
        save(folder, step, content)
        if folder == killed.fold(2).root / "refit" / "checkpoints" and step > 0:
            raise Killed

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(Killed):
        run_job(spec, killed, Workspace.at(home), silent, tracked=False)
    monkeypatch.undo()
    monkeypatch.setenv("FINETUNE_HOME", str(home))
    assert killed.fold(1).outcome.exists()
    assert not killed.fold(2).outcome.exists()
    first_fold = killed.fold(1).outcome.stat().st_mtime_ns
    outcome = run_job(spec, killed, Workspace.at(home), silent, tracked=False)
    assert killed.fold(1).outcome.stat().st_mtime_ns == first_fold, "a finished fold is not done again"
    assert [line["kind"] for line in read_lines(killed.fold(2).root / "refit" / "events.jsonl")].count("resumed") == 1
    assert weights_of(killed) == weights_of(whole)
    figures = {key: value for key, value in outcome.metrics.items() if not key.startswith("cost/")}
    assert figures == {key: expected.metrics[key] for key in figures}
    assert all(np.array_equal(np.load(killed.fold(n).held_out), np.load(whole.fold(n).held_out)) for n in (1, 2))


def train_in_a_process(spec: JobSpec, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    request = home / "request.yaml"
    home.mkdir(exist_ok=True)
    request.write_text(spec.to_yaml())
    command = [sys.executable, "-m", "finetune", "train", str(request), "--run-dir", str(home / "run"), "--no-mlflow"]
    variables = {**os.environ, "FINETUNE_HOME": str(home), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def uninterrupted(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("uninterrupted")
    ended = train_in_a_process(spec_of(pictures, **STEPPED), home)
    assert ended.returncode == 0, ended.stderr
    return weights_of(RunDir(home / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", ["before replace step-00000003.pt 3", "after replace held_out.npy 2", "after replace folds.json"]
)
def test_a_killed_process_with_folds_resumes_to_the_same_bits(
    point: str, pictures: Path, uninterrupted: str, tmp_path: Path
) -> None:
    spec, home = spec_of(pictures, **STEPPED), tmp_path / "killed"
    crash = {"PYTHONPATH": str(CRASHING), "CRASH_AT": point, "CRASH_MARK": str(tmp_path / "crashed")}
    died = train_in_a_process(spec, home, **crash)
    assert died.returncode == -9, died.stderr
    resumed = train_in_a_process(spec, home)
    assert resumed.returncode == 0, resumed.stderr
    assert weights_of(RunDir(home / "run")) == uninterrupted


def test_check_refuses_more_folds_than_a_class_has_images_and_shows_the_folds_otherwise(pictures: Path) -> None:
    tiny = ["--model", "test_efficientnet", "--set", "model.weights=none", "--set", "model.input_size_px=64", "--json"]
    command = ["check", "--data", str(pictures), *tiny, "--folds"]
    with pytest.raises(DataError, match=r"data\.folds: 11 does not fit .*class 'class0' has 10 distinct images.* 2 to 10 folds"):
        CliRunner().invoke(cli, [*command, "11"], catch_exceptions=False, standalone_mode=False)
    shown = CliRunner().invoke(cli, [*command, "10"], catch_exceptions=False, standalone_mode=False)
    folds = json.loads(shown.stdout)["folds"]
    assert [fold["test"] for fold in folds] == [{"class0": 1, "class1": 1, "class2": 1}] * 10
