"""Every job that solves a head notes labels that its features contradict, at little cost and without changing anything."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from folders import local_sample
from tiny_runs import carry_out_at, tiny_spec, write_stripes

from finetune.data.dataset import Dataset
from finetune.doctor.examine import examine
from finetune.doctor.labels import doubt_label_sets, doubt_labels
from finetune.features.left_out import RIDGE, doubted_label_sets, doubted_labels, left_out_scores
from finetune.storage.files import write_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.training.label_doubts import label_doubts_sentence, record_label_doubts

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
        record_label_doubts(run, dataset, [(samples[:60], features[:60]), (samples[60:], features[60:])])
    with study.label_doubts.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert {name: row[name] for name in ("path", "split", "label", "suggested")} == {
        "path": "7.jpg",
        "split": "train",
        "label": CLASSES[given[7]],
        "suggested": CLASSES[labels[7]],
    }
    said = label_doubts_sentence(runs[1])
    assert said == label_doubts_sentence(study)
    assert said[0].startswith(
        f"Labels that are probably wrong: 1 image (7.jpg is {CLASSES[given[7]]}, rather {CLASSES[labels[7]]})"
    )
    assert [len(read_lines(run.events)) for run in runs] == [1, 0]
    assert label_doubts_sentence(RunDir(tmp_path / "another")) == ()


def label_sets(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Features as of `clouds`, and targets (n, 4): the class, and a label that every second image has, in features of its own."""
    features, labels = clouds(n)
    second = np.arange(n) // 3 % 2
    own = (second * 8.0 + np.random.default_rng(1).normal(size=n))[:, None].repeat(4, axis=1)
    targets = np.column_stack([np.eye(3, dtype=np.uint8)[labels], second])
    return np.concatenate([features, own], axis=1).astype(np.float32), targets


def test_single_labels_of_several_are_doubted() -> None:
    features, targets = label_sets(300)
    assert doubted_label_sets([features], targets) == []
    given = targets.copy()
    wrong = range(0, 300, 29)
    given[wrong, 3] ^= 1
    found = doubted_label_sets([features[:100], features[100:]], given)
    assert {doubt.row for doubt in found} <= set(wrong)
    assert len(found) >= len(wrong) // 3, "those that look like the opposite at least as much as it does on average"
    for doubt in found:
        assert (doubt.missing, doubt.wrong) == (((3,), ()) if targets[doubt.row, 3] else ((), (3,)))
    assert [doubt.own_score for doubt in found] == sorted(doubt.own_score for doubt in found)
    assert doubted_label_sets([features[:45]], given[:45]) == [], "too few images"
    chance = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    assert doubted_label_sets([chance], given) == [], "features that know nothing"


def test_doubts_of_several_labels_are_told_label_by_label(tmp_path: Path) -> None:
    features, targets = label_sets(90)
    given = targets.copy()
    number = int(features[:, -1].argmax())  # clearly wet
    given[number, 3] = 0
    names = (*CLASSES, "wet")
    samples = [
        replace(
            local_sample(Path(f"{place}.jpg"), 0, "train"),
            target=tuple(int(one) for one in np.flatnonzero(row)),
            sha256=f"{place:064x}",
            size_px=(9, 9),
        )
        for place, row in enumerate(given)
    ]
    run, dataset = RunDir(tmp_path / "run").create(), Dataset("trees", "/trees", names, tuple(samples))
    record_label_doubts(run, dataset, [(samples, features)])
    (said,) = label_doubts_sentence(run)
    assert said.startswith(f"Labels that are probably wrong: 1 image ({number}.jpg is probably also wet)")
    with run.label_doubts.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    right = {names[one] for one in np.flatnonzero(targets[number])}
    assert set(json.loads(row["suggested"])) == right
    doubts = doubt_label_sets(samples, features, 4)
    assert doubts is not None
    assert [one.row for one in doubts.doubted] == [number]
    assert int(doubts.confidence.argmin()) == number
    finding = examine(dataset, features, backbone="none").of("label_errors")
    assert finding is not None
    assert "is probably also wet" in finding.cases[0].said
    assert set(json.loads(finding.cases[0].suggested or "")) == right


def test_a_label_that_the_others_exclude_is_doubted_where_the_picture_alone_does_not_tell() -> None:
    rng = np.random.default_rng(0)
    kinds = np.arange(240) % 3  # of which every image has exactly one
    features = np.concatenate([np.eye(3)[kinds] * 1.6, rng.normal(size=(240, 5))], axis=1) + rng.normal(size=(240, 8)) * 0.8
    given = np.eye(3, dtype=int)[kinds]
    given[:4, :] |= np.roll(given[:4], 1, axis=1)  # a second kind
    given[4:8] = 0  # none
    samples = [
        replace(local_sample(Path(f"{n}.jpg"), 0, "train"), target=tuple(int(one) for one in np.flatnonzero(row)))
        for n, row in enumerate(given)
    ]
    doubts = doubt_label_sets(samples, features.astype(np.float32), 3)
    assert doubts is not None
    assert set(np.argsort(doubts.confidence)[:12]) >= set(range(8))


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
    monkeypatch.setattr("finetune.training.head.record_label_doubts", lambda *given: None)
    without = carry_out_at(tmp_path, tiny_spec(pictures), plain)
    assert without.metrics == outcome.metrics
    assert run.predictions_of("test").read_bytes() == plain.predictions_of("test").read_bytes()


def test_features_that_do_not_tell_the_classes_apart_give_no_list_and_it_is_said_why() -> None:
    rng = np.random.default_rng(0)
    samples = [replace(local_sample(Path(f"{row}"), int(row % 3)), sha256=f"{row:064x}", split="train") for row in range(150)]
    blind = doubt_labels(samples, rng.normal(size=(150, 16)).astype(np.float32), 3)
    assert blind is not None
    assert blind.doubted == ()
    assert blind.why_none == "is hardly better than always naming the largest class"
    labels = np.arange(150) % 3
    shown = np.where(rng.random(150) < 0.33, (labels + 1) % 3, labels)
    half = doubt_labels(samples, (np.eye(3, 16)[shown] * 9 + rng.normal(size=(150, 16))).astype(np.float32), 3)
    assert half is not None
    assert half.doubted == ()
    assert "too many to be mistakes" in half.why_none
    few = labels.copy()
    few[:6] = (few[:6] + 1) % 3
    sound = doubt_labels(samples, (np.eye(3, 16)[few] * 9 + rng.normal(size=(150, 16))).astype(np.float32), 3)
    assert sound is not None
    assert (set(sound.doubted), sound.why_none) == (set(range(6)), "")
    dataset = Dataset("data", "data", CLASSES, tuple(samples))
    findings = {one.kind: one for one in examine(dataset, rng.normal(size=(150, 16)).astype(np.float32), backbone="x").findings}
    assert "hardly better than always naming the largest class" in findings["labels_not_judged"].evidence
    assert "label_errors" not in findings
