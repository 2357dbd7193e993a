"""Where classes differ much in size, the mean over classes is told first at every door, with an interval that holds the truth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from answers import table
from run_folders import CLASSES, begin_run, end_run, figures, spec_of
from tiny_bundle import write_tiny_bundle

from finetune.bundle.card import model_card
from finetune.bundle.manifest import read_manifest
from finetune.cli.show_comparison import show_comparison
from finetune.cli.show_models import show_manifest
from finetune.evaluation.compare import ArmPredictions, class_mean_interval
from finetune.evaluation.evaluate import Evaluation, RunEvaluation, evaluate, read_evaluation, write_evaluation
from finetune.evaluation.predictions import Predictions
from finetune.metrics.imbalance import are_unequal
from finetune.metrics.intervals import interval_of_mean_of_proportions, wilson_interval
from finetune.report.run_figures import draw_figures
from finetune.report.run_page import ReportInputs, render_report
from finetune.runs.evaluate import evaluate_splits
from finetune.storage.rundir import RunDir
from finetune.storage.workspace import Workspace
from finetune.studies.compare.result import ArmRuns, conclude
from finetune.tasks import task_named
from finetune.tasks.leading import WHY_OVER_CLASSES, recorded_leading
from finetune.tracking.description import describe
from finetune.tracking.view import read_view

PER_CLASS = "mean_per_class_accuracy"


def answered(right: dict[str, tuple[int, int]]) -> Predictions:
    """Answers of which so many of so many images of each class are right; a wrong answer is the next class."""
    labels, logits = [], []
    for label, (n_right, n) in enumerate(right.values()):
        for number in range(n):
            row = np.zeros(len(right), np.float32)
            row[label if number < n_right else (label + 1) % len(right)] = 4.0
            labels.append(label)
            logits.append(row)
    return table(np.array(logits), np.array(labels), tuple(right), split="test")


UNEQUAL = {"rose": (95, 100), "tulip": (15, 20), "iris": (2, 4)}
EQUAL = {"rose": (19, 20), "tulip": (15, 20), "iris": (10, 20)}


@pytest.mark.parametrize(
    ("counts", "unequal"),
    [
        ([100, 20], True),
        ([100, 21], False),
        ([100, 20, 0], True),
        ([100, 0], False),  # one class has images
        ([20, 4], True),
        ([19, 1], False),  # equal classes come out like this by chance
        ([], False),
    ],
)
def test_classes_are_unequal_by_one_rule(counts: list[int], unequal: bool) -> None:
    assert are_unequal(counts) is unequal


def test_the_interval_of_one_proportion_is_no_narrower_than_wilsons_and_holds_the_mean() -> None:
    for right, n in ((0, 5), (5, 5), (3, 7), (60, 80)):
        low, high = interval_of_mean_of_proportions([right], [n])
        wilson_low, wilson_high = wilson_interval(right, n)
        assert low <= wilson_low <= right / n <= wilson_high <= high, (right, n)
    low, high = interval_of_mean_of_proportions([100, 2], [100, 2])  # the bootstrap and Wald say that this is certain
    assert low < 0.7
    assert high == 1.0


@pytest.mark.parametrize(
    ("n", "recall"),
    [
        ([100, 5], [0.95, 0.6]),
        ([100, 20, 2], [0.95, 0.8, 0.5]),
        ([100, 40, 16, 6, 2], [0.9, 0.9, 0.8, 0.7, 0.6]),
        ([40] * 5 + [3] * 20, [0.9] * 5 + [0.7] * 20),
    ],
)
def test_the_interval_holds_the_mean_recall_as_often_as_it_says(n: list[int], recall: list[float]) -> None:
    drawn = np.random.default_rng(0).binomial(n, recall, (600, len(n)))
    truth = float(np.mean(recall))
    bounds = [interval_of_mean_of_proportions(right.tolist(), n) for right in drawn]
    assert np.mean([low <= truth <= high for low, high in bounds]) >= 0.92
    assert np.mean([high - low for low, high in bounds]) < 0.6


def test_an_evaluation_tells_the_mean_over_classes_first_where_classes_are_unequal(tmp_path: Path) -> None:
    unequal, equal = evaluate(answered(UNEQUAL)), evaluate(answered(EQUAL))
    assert (unequal.leading.key, unequal.headline) == (PER_CLASS, "top1")  # what chooses and tests is as it was
    assert [metric.key for metric in unequal.shown][:2] == [PER_CLASS, "top1"]
    assert unequal.values[PER_CLASS] == pytest.approx((0.95 + 0.75 + 0.5) / 3)
    assert unequal.intervals[PER_CLASS] == interval_of_mean_of_proportions([95, 15, 2], [100, 20, 4])
    assert unequal.why_leading == WHY_OVER_CLASSES
    assert (equal.leading.key, equal.why_leading) == ("top1", "")
    assert {f"test/{PER_CLASS}_low", "test/top1_low"} <= unequal.metrics("test").keys()
    assert f"test/{PER_CLASS}_low" not in equal.metrics("test")
    assert unequal.to_json()["leading"] == PER_CLASS
    write_evaluation(tmp_path / "evaluation.json", RunEvaluation({"test": unequal}))
    assert read_evaluation(tmp_path / "evaluation.json").evaluations["test"] == unequal


def test_classes_are_unequal_by_the_whole_data_of_a_run_and_not_by_a_split_that_is_small() -> None:
    small = answered({"rose": (9, 10), "tulip": (3, 4), "iris": (2, 3)})
    assert evaluate(small).leading.key == "top1"
    told = evaluate_splits({"test": small}, class_sizes=(120, 30, 24)).evaluations["test"]
    assert told.leading.key == PER_CLASS
    assert Evaluation.from_json(json.loads(json.dumps(told.to_json()))) == told


def test_an_evaluation_of_an_earlier_release_leads_with_its_headline() -> None:
    old = evaluate(answered(UNEQUAL)).to_json()
    old["intervals"] = {key: interval for key, interval in old["intervals"].items() if key != PER_CLASS}
    del old["leading"]
    assert Evaluation.from_json(old).leading.key == "top1"


def test_recorded_figures_tell_what_was_told_first() -> None:
    task = task_named("multiclass")
    assert recorded_leading(task, evaluate(answered(UNEQUAL)).metrics("test"), "test").key == PER_CLASS
    assert recorded_leading(task, evaluate(answered(EQUAL)).metrics("test"), "test").key == "top1"


def test_models_show_and_the_card_begin_with_the_mean_over_classes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    judged = evaluate(answered(UNEQUAL)).metrics("test")
    write_tiny_bundle(tmp_path / "bundle", metrics=judged)
    manifest = read_manifest(tmp_path / "bundle")
    show_manifest(manifest)
    said = " ".join(capfd.readouterr().err.split())
    assert "mean per-class accuracy 73.3% on 124 test images (95 % interval 5" in said
    assert WHY_OVER_CLASSES[:40] in said
    rows = [line for line in model_card(manifest).splitlines() if line.startswith("|")]
    names = [row.split("|")[1].strip() for row in rows]
    assert names.index("mean per-class accuracy") < names.index("top-1 accuracy")
    assert "73.3% (5" in rows[names.index("mean per-class accuracy")]


def test_the_report_begins_with_the_mean_over_classes_and_shows_the_classes_next() -> None:
    inputs = ReportInputs(title="flowers", evaluations={"test": evaluate(answered(UNEQUAL))})
    page = render_report(inputs, draw_figures([], inputs))
    assert page.index("test: mean per-class accuracy") < page.index(WHY_OVER_CLASSES) < page.index("<h2>Classes (test)")
    assert page.index("<h2>Classes (test)") < page.index("<h2>Confusion (test)")
    assert page.count("<h2>Classes (test)") == 1
    equal = replace(inputs, evaluations={"test": evaluate(answered(EQUAL))})
    page = render_report(equal, draw_figures([], equal))
    assert "test: top-1 accuracy" in page
    assert page.count("<h2>Classes (test)") == 1
    assert WHY_OVER_CLASSES not in page


def test_mlflow_sorts_by_and_describes_the_mean_over_classes(tmp_path: Path) -> None:
    run = RunDir(Workspace(tmp_path, tmp_path / "networks").runs / "a-run")
    resolved = begin_run(run, spec_of())
    measured = {**figures(0.9), f"test/{PER_CLASS}": 0.7, f"test/{PER_CLASS}_low": 0.5, f"test/{PER_CLASS}_high": 0.8}
    end_run(run, resolved, metrics=measured)
    view = read_view(run, alive=False)
    assert view.headline == f"test/{PER_CLASS}"
    described = describe(run, view)
    assert described.startswith("**mean per-class accuracy 70.0%** on 14 test images (95 % interval 50.0% to 80.0%; the mean")
    assert described.index("| mean per-class accuracy") < described.index("| top-1 accuracy")
    document = json.loads(run.resolved.read_text())
    document["dataset"]["counts"]["train"] = {"rose": 1000, "tulip": 200, "iris": 40}
    run.resolved.write_text(json.dumps(document))
    assert read_view(run, alive=True).expected_headline == f"test/{PER_CLASS}"


def test_a_comparison_shows_the_mean_over_classes_of_each_arm_and_tests_as_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arms = []
    for name, tulips in (("full", 18), ("linear_probe", 12)):
        runs = tuple(answered({**UNEQUAL, "tulip": (tulips + seed, 20)}) for seed in range(2))
        run = RunDir(tmp_path / name)
        resolved = begin_run(run, spec_of())
        outcomes = tuple(end_run(run, resolved, classes=CLASSES, metrics=evaluate(one).metrics("test")) for one in runs)
        arms.append(ArmRuns(ArmPredictions(name, runs), outcomes))
    found = conclude(arms, identifier="c", folder=tmp_path, dataset="flowers", split="test", margin=0.01).to_dict()
    assert (found["headline"], found["leading"]) == ("test/top1", f"test/{PER_CLASS}")
    assert {pair["metric"] for pair in found["pairs"] if pair["p_adjusted"] is not None} == {"test/top1"}
    figure = found["arms"][0]["metrics"][f"test/{PER_CLASS}"]
    assert figure["low"] < figure["value"] < figure["high"]
    alone = ArmPredictions("full", arms[0].predictions.runs[:1])
    assert class_mean_interval(alone) == pytest.approx(interval_of_mean_of_proportions([95, 18, 2], [100, 20, 4]))
    show_comparison(found, "report.html")
    said = " ".join(capfd.readouterr().err.split())
    assert said.index("mean per-class accuracy (test)") < said.index("top-1 accuracy on 124 test images")
    assert "arms are tested by" in said
