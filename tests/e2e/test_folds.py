"""A job with folds, from a folder of pictures to a registered model: every image tested once, and no fold done twice."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from crash_points import crashing_at
from tiny_runs import carry_out_at, tiny_spec, weights_of, write_stripes

from finetune.bundle.manifest import read_manifest
from finetune.cli import cli
from finetune.errors import DataError
from finetune.evaluation.evaluate import POOLED, evaluate, read_evaluation
from finetune.evaluation.predictions import concatenate, read
from finetune.messages import duration
from finetune.progress import Progress
from finetune.runs.outcome import Outcome
from finetune.spec import JobSpec
from finetune.storage.files import read_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.training import checkpoint

pytestmark = pytest.mark.usefixtures("one_torch_thread")

STEPPED = {
    "method": {"type": "full", "warm_head": False, "bn": "train"},
    "hyperparameters": {"n_epochs": 1, "batch_size": 4, "mixup": 0.2},
    "data": {"folds": 2},
    "export": {"register_model": "always"},  # one epoch teaches a network without weights nothing
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace that the tests share: what does not depend on a run is computed once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("pictures"), 30)


@pytest.fixture(scope="module")
def cross_validated(pictures: Path, home: Path) -> tuple[Outcome, RunDir, list[Progress]]:
    run, seen = RunDir(home / "runs" / "probe"), []
    return carry_out_at(home, tiny_spec(pictures, data={"folds": 3}), run, seen.append), run, seen


def fold(run: RunDir, number: int) -> RunDir:
    return run.child(f"fold-{number}")


def read_split(path: Path) -> dict[str, str]:
    with open(path, encoding="utf-8", newline="") as stream:
        return {row["path"]: row["split"] for row in csv.DictReader(stream)}


def test_every_image_is_tested_by_the_one_fold_that_did_not_train_on_it(cross_validated: Any) -> None:
    outcome, run, _ = cross_validated
    splits = [read_split(fold(run, number).split) for number in (1, 2, 3)]
    tested = Counter(name for split in splits for name, side in split.items() if side == "test")
    assert set(tested.values()) == {1}
    assert len(tested) == 30
    assert all({"train", "val", "test"} == set(split.values()) for split in splits)
    assert set(read_split(run.split).values()) == {"train", "val"}, "the final model is not tested by images kept back"
    assert "test/top1" not in outcome.metrics


def test_the_pooled_figures_are_those_of_all_held_out_answers(cross_validated: Any) -> None:
    outcome, run, _ = cross_validated
    tables = []
    for number in (1, 2, 3):
        table = read(fold(run, number).predictions_of("test"))
        split = read_split(fold(run, number).split)
        assert list(table.ids) == [name for name, side in split.items() if side == "test"]
        assert [table.classes[target] for target in table.labels] == [Path(name).parent.name for name in table.ids]
        own = read_json(fold(run, number).outcome)["metrics"]["test/top1"]
        assert own == read_evaluation(fold(run, number).evaluation).evaluations["test"].values["top1"]
        tables.append(table)
    pooled = evaluate(concatenate(tables, POOLED))
    assert read_evaluation(run.evaluation).evaluations[POOLED] == pooled
    assert evaluate(read(run.predictions_of(POOLED))) == pooled
    assert outcome.metrics["cv/top1"] == pooled.values["top1"]
    assert Outcome.read(run) == outcome
    assert [found["n_train"] + found["n_test"] for found in outcome.cross_validation["folds"]] == [30, 30, 30]


def test_the_final_model_is_fitted_on_every_image_and_says_what_its_figures_are_of(cross_validated: Any) -> None:
    outcome, run, seen = cross_validated
    assert "once more on train + val" in outcome.summary
    manifest = read_manifest(outcome.bundle)
    assert manifest.metrics["cv/top1"] == outcome.metrics["cv/top1"]
    assert any("had not seen it" in note for note in manifest.method["notes"])
    held_out = manifest.calibration["held_out"]
    assert (held_out["split"], held_out["n"], held_out["checked"]) == ("cv", 30, {})
    assert "calibrated on 30 held-out images (cv)" in (outcome.bundle / "README.md").read_text(encoding="utf-8")
    report = run.report.read_text(encoding="utf-8")
    assert "How far to rely on an answer (cv)" in report
    assert "Cross-validation" in report
    assert "Expect top-1 accuracy" in report
    assert "held out by fold 3" in report, "the images are those of the whole study"
    asked = re.search(r"data\.folds</t[dh]>\s*<t[dh][^>]*>([^<]*)<", report)
    assert asked is not None
    assert asked[1] == "3", "the request is the study's, not that of the run that it keeps"
    told = re.search(r"training, without cached features</t[dh]>\s*<t[dh][^>]*>([^<]*)<", report)
    assert told is not None
    assert told[1] == duration(outcome.cost["train_seconds"]), "the cost is that of the whole study"
    assert any(update.message.startswith("fold 2 of 3: ") for update in seen)
    assert outcome.n_train == 30
    bundles = sorted(path.parent.relative_to(run.root) for path in run.root.rglob("bundle.json"))
    assert bundles == [Path("runs/final/runs/refit/bundle")], "folds export nothing"


def test_training_seconds_are_those_of_all_folds_with_the_features_once(cross_validated: Any) -> None:
    outcome, run, _ = cross_validated
    children = [Outcome.read(run.child(name)) for name in read_json(run.study)["children"]]
    assert [child.run.name for child in children] == ["fold-1", "fold-2", "fold-3", "final"]
    features = [child.cost["feature_seconds"] for child in children]
    own = [child.cost["train_seconds"] - child.cost["feature_seconds"] for child in children]
    assert min(features) > 0
    assert outcome.cost["feature_seconds"] == max(features), "they share their features"
    assert outcome.cost["train_seconds"] == pytest.approx(sum(own) + max(features))
    assert outcome.cost["wall_seconds"] > sum(child.cost["wall_seconds"] for child in children)


class Killed(BaseException):
    """Stands for the death of the process: nothing catches it."""


@pytest.mark.longer
def test_a_job_that_dies_amid_its_second_fold_goes_on_there_and_ends_with_the_same_bits(
    pictures: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec(pictures, **STEPPED)
    whole, killed = RunDir(home / "runs" / "whole"), RunDir(home / "runs" / "killed")
    expected = carry_out_at(home, spec, whole)
    save, second = checkpoint.save, fold(killed, 2)

    def dying(folder: Path, step: int, content: Any) -> None:
        save(folder, step, content)
        if folder == second.child("refit").checkpoints and step > 0:
            raise Killed

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(Killed):
        carry_out_at(home, spec, killed)
    monkeypatch.undo()
    assert fold(killed, 1).outcome.exists()
    assert not second.outcome.exists()
    spent = read_json(killed.cost)["wall_seconds"]
    first_fold = fold(killed, 1).outcome.stat().st_mtime_ns
    outcome = carry_out_at(home, spec, killed)
    assert fold(killed, 1).outcome.stat().st_mtime_ns == first_fold, "a finished fold is not done again"
    assert [line["kind"] for line in read_lines(second.child("refit").events)].count("resumed") == 1
    assert weights_of(outcome.bundle) == weights_of(expected.bundle)
    assert outcome.metrics == expected.metrics
    for split in (POOLED, "val"):
        assert np.array_equal(read(killed.predictions_of(split)).logits, read(whole.predictions_of(split)).logits)
    assert outcome.cost["wall_seconds"] > spent > 0, "the first attempt counts too"


def train_in_a_process(spec: JobSpec, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    request = home / "request.yaml"
    home.mkdir(exist_ok=True)
    request.write_text(spec.to_yaml())
    command = [sys.executable, "-m", "finetune", "train", str(request), "--run-dir", str(home / "run")]
    variables = {**os.environ, "FINETUNE_HOME": str(home), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def uninterrupted(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("uninterrupted")
    ended = train_in_a_process(tiny_spec(pictures, **STEPPED), home)
    assert ended.returncode == 0, ended.stderr
    return weights_of(home / "run" / "runs" / "final" / "runs" / "refit" / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        "before replace step-0000000[1-9].pt once killed/run/runs/fold-2/runs/refit/checkpoints",
        "after replace test.npz once killed/run/runs/fold-1/outcome.json",
        r"after replace study.json with kept\W+final",
        "before replace outcome.json once killed/run/runs/final/runs/refit/bundle",
    ],
)
def test_a_killed_process_with_folds_resumes_to_the_same_bits(
    point: str, pictures: Path, uninterrupted: str, tmp_path: Path
) -> None:
    spec, home = tiny_spec(pictures, **STEPPED), tmp_path / "killed"
    died = train_in_a_process(spec, home, **crashing_at(point, tmp_path / "crashed"))
    assert died.returncode == -9, died.stderr
    resumed = train_in_a_process(spec, home)
    assert resumed.returncode == 0, resumed.stderr
    assert weights_of(home / "run" / "runs" / "final" / "runs" / "refit" / "bundle") == uninterrupted


@pytest.mark.usefixtures("unmeasured_machine")
def test_check_refuses_more_folds_than_a_class_has_images_and_shows_the_folds_otherwise(pictures: Path) -> None:
    tiny = ["--model", "test_efficientnet", "--set", "model.weights=none", "--set", "model.input_size_px=64", "--json"]
    command = ["check", "--data", str(pictures), *tiny, "--folds"]
    with pytest.raises(DataError, match=r"data\.folds: 11 does not fit .*class 'class0' has 10 images.* --folds 10;"):
        CliRunner().invoke(cli, [*command, "11"], catch_exceptions=False, standalone_mode=False)
    shown = CliRunner().invoke(cli, [*command, "10"], catch_exceptions=False, standalone_mode=False)
    folds = json.loads(shown.stdout)["folds"]
    assert [fold["test"] for fold in folds] == [{"class0": 1, "class1": 1, "class2": 1}] * 10
