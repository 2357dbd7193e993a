"""Every job that solves a head notes labels that its features contradict, at little cost and without changing anything."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from folders import local_sample
from tiny_runs import carry_out_at, tiny_spec, write_stripes

from finetune.data.dataset import Dataset
from finetune.features.left_out import RIDGE, doubted_labels, left_out_scores
from finetune.storage.files import write_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.training.label_doubts import label_doubts_noted, note_label_doubts

CLASSES = ("ash", "beech", "cedar")


def clouds(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features as a backbone gives them: many, of which few combinations vary much; and labels that they tell."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    few = np.eye(3, 8)[labels] * 15 + rng.normal(size=(n, 8))
    return (few @ rng.normal(size=(8, 64)) + 0.1 * rng.normal(size=(n, 64)) + 5.0).astype(np.float32), labels


def test_scores_are_those_of_a_classifier_that_was_fitted_without_the_image() -> None:
    features, labels = clouds(60)
    targets = np.eye(3, dtype=np.float32)[labels]
    found = left_out_scores([features[:13], features[13:50], features[50:]], targets)
    standardised = ((features - features.mean(axis=0)) / features.std(axis=0)).astype(np.float64)
    # the penalty is per image, and the centre that of all images, as the fit with them has it
    for row in (0, 20, 59):
        rest = np.arange(60) != row
        with_bias = np.column_stack([standardised, np.ones(60)])
        penalty = np.diag([RIDGE * 60] * 64 + [0.0])
        weights = np.linalg.solve(with_bias[rest].T @ with_bias[rest] + penalty, with_bias[rest].T @ targets[rest])
        assert found[row] == pytest.approx(with_bias[row] @ weights, abs=1e-4)


def test_labels_that_the_features_contradict_are_doubted_and_no_others() -> None:
    features, labels = clouds(300)
    assert doubted_labels([features], labels, 3) == []
    given = labels.copy()
    wrong = np.arange(0, 300, 29)
    given[wrong] = (given[wrong] + 1) % 3
    found = doubted_labels([features[:100], features[100:]], given, 3)
    rows = {doubt.row for doubt in found}
    assert rows <= set(wrong.tolist())
    assert len(rows) >= len(wrong) // 3, "those that look like their own class at least as much as it does on average"
    assert all(doubt.suggested == labels[doubt.row] for doubt in found)
    assert [doubt.own_score for doubt in found] == sorted(doubt.own_score for doubt in found)


def test_nothing_is_doubted_where_too_little_is_known() -> None:
    features, labels = clouds(300)
    given = labels.copy()
    given[:4] = (given[:4] + 1) % 3
    assert doubted_labels([features[:45]], given[:45], 3) == [], "too few images"
    assert doubted_labels([np.random.default_rng(0).normal(size=(300, 8))], given, 3) == [], "features that know nothing"
    assert doubted_labels([features * np.nan], given, 3) == []
    assert doubted_labels([np.ones((300, 8), np.float32)], given, 3) == [], "features that do not vary"


def test_the_first_run_of_a_study_writes_the_table_and_all_of_them_say_it(tmp_path: Path) -> None:
    features, labels = clouds(90)
    given = labels.copy()
    given[7] = (given[7] + 1) % 3
    samples = [local_sample(Path(f"{number}.jpg"), int(label), "train") for number, label in enumerate(given)]
    dataset = Dataset("trees", "/trees", CLASSES, tuple(samples))
    study = RunDir(tmp_path / "study").create()
    write_json(study.study, {"kind": "folds"})
    runs = [study.child(name).create() for name in ("one", "two")]
    for run in runs:
        note_label_doubts(run, dataset, [(samples[:60], features[:60]), (samples[60:], features[60:])])
    with study.label_doubts.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert {name: row[name] for name in ("path", "split", "label", "suggested")} == {
        "path": "7.jpg",
        "split": "train",
        "label": CLASSES[given[7]],
        "suggested": CLASSES[labels[7]],
    }
    said = label_doubts_noted(runs[1])
    assert said == label_doubts_noted(study)
    assert said[0].startswith(
        f"Labels that are probably wrong: 1 image (7.jpg is {CLASSES[given[7]]}, rather {CLASSES[labels[7]]})"
    )
    assert [len(read_lines(run.events)) for run in runs] == [1, 0]
    assert label_doubts_noted(RunDir(tmp_path / "another")) == ()


@pytest.mark.longer
@pytest.mark.usefixtures("one_torch_thread")
def test_a_job_notes_them_in_its_events_result_and_report_and_its_answers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = write_stripes(tmp_path, 90)
    moved = pictures / "class0" / "moved.png"
    next(iter(sorted((pictures / "class1").glob("*")))).rename(moved)
    run, plain = RunDir(tmp_path / "runs" / "noted"), RunDir(tmp_path / "runs" / "plain")
    outcome = carry_out_at(tmp_path, tiny_spec(pictures), run)
    (said,) = [one for one in outcome.warnings if one.startswith("Labels that are probably wrong")]
    assert "class0/moved.png is class0, rather class1" in said
    assert said in [line.get("message") for line in read_lines(run.events)]
    assert "class0/moved.png is class0, rather class1" in run.report.read_text()
    monkeypatch.setattr("finetune.training.head.note_label_doubts", lambda *given: None)
    without = carry_out_at(tmp_path, tiny_spec(pictures), plain)
    assert without.metrics == outcome.metrics
    assert run.predictions_of("test").read_bytes() == plain.predictions_of("test").read_bytes()
