"""Jobs that have the features of all images find near duplicates of held-out images in train, and evaluate without them too."""

from __future__ import annotations

import csv
import html
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from planted import saved
from tiny_runs import carry_out_at, shared_at, tiny_spec

from finetune.api.run import Run
from finetune.data.check import check_images
from finetune.data.dataset import Dataset
from finetune.data.index import index_dataset
from finetune.data.split import read_recorded_split
from finetune.evaluation.evaluate import read_evaluation
from finetune.runs.outcome import Outcome
from finetune.storage.files import read_json, write_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.training import near_copies
from finetune.training.measurements import NEIGHBOURS_COLUMNS
from finetune.training.near_copies import near_copies_in, near_copies_sentence, pool_near_copies, record_near_copies


def picture(seed: int) -> Image.Image:
    """Return a picture with coarse and fine structure of its own."""
    rng = np.random.default_rng(seed)
    total = np.zeros((120, 160, 3))
    for cells, strength in ((4, 120), (16, 60), (48, 40)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize(
            (160, 120), Image.Resampling.BICUBIC
        )
        total += np.asarray(noise, np.float64) * strength / 220
    return Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))


def write_pictures(root: Path, counts: dict[str, int]) -> Path:
    """Write pictures, each of another seed, into folders ``split/class``."""
    for number, (place, count) in enumerate(counts.items()):
        (root / place).mkdir(parents=True)
        for one in range(count):
            (root / place / f"{one:02d}.jpg").write_bytes(saved(picture(1000 * number + one), 90))
    return root


@pytest.fixture
def leaking(tmp_path: Path) -> Dataset:
    """Return data of which one test image is a smaller copy of a training image."""
    root = write_pictures(tmp_path / "data", {"train/a": 6, "train/b": 6, "val/a": 2, "val/b": 2, "test/a": 2, "test/b": 2})
    (root / "test/a/copy.jpg").write_bytes(saved(picture(3).resize((120, 90))))
    return check_images(index_dataset(root))


def write_candidates(run: RunDir, rows: Sequence[tuple[str, str, str, float]]) -> None:
    run.measurements.mkdir(parents=True, exist_ok=True)
    with run.neighbours.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(NEIGHBOURS_COLUMNS)
        table.writerows((split, one, "", other, "", ratio) for split, one, other, ratio in rows)


CANDIDATES = [
    ("val", "val/a/00.jpg", "train/a/00.jpg", 0.7),
    ("test", "test/a/copy.jpg", "train/a/03.jpg", 0.4),
    ("test", "test/a/01.jpg", "train/b/01.jpg", 0.8),
    ("test", "test/b/01.jpg", "train/b/02.jpg", 0.95),
]


def test_a_copy_among_the_candidates_is_named_and_other_pictures_are_not(leaking: Dataset, tmp_path: Path) -> None:
    run, store = RunDir(tmp_path / "run").create(), shared_at(tmp_path / "home").store
    write_candidates(run, CANDIDATES)
    record_near_copies(run, leaking, store, threads=1)
    assert near_copies_in(run) == {"test": {"test/a/copy.jpg"}}
    found = read_json(run.near_copies)
    assert (found["candidates"], found["compared"]) == (3, 3), "a pair that is as far as others is not compared"
    (said,) = near_copies_sentence(run)
    assert said.startswith("Near duplicates of training images: 1 test image (test/a/copy.jpg is train/a/03.jpg)")
    assert said in [line.get("message") for line in read_lines(run.events)]


def test_pairs_are_compared_once_and_the_likeliest_first(
    leaking: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [RunDir(tmp_path / name).create() for name in ("one", "two")]
    store = shared_at(tmp_path / "home").store
    monkeypatch.setattr(near_copies, "MOST_COMPARED", 1)
    monkeypatch.setattr(near_copies, "MOST_COMPARED_SHARE", 0.0)
    for run in runs:
        write_candidates(run, CANDIDATES)
        record_near_copies(run, leaking, store, threads=1)
        monkeypatch.setattr("finetune.features.duplicates._picture", lambda sample: pytest.fail("compared again"))
    assert near_copies_in(runs[1]) == near_copies_in(runs[0]) == {"test": {"test/a/copy.jpg"}}
    assert "Of 3 likely pairs 1 were compared" in near_copies_sentence(runs[0])[0]


def test_files_with_the_same_bytes_are_left_to_the_check_of_the_data(leaking: Dataset, tmp_path: Path) -> None:
    same = {sample.id: sample.sha256 for sample in leaking.samples}["train/a/03.jpg"]
    samples = tuple(replace(s, sha256=same) if s.id == "test/a/copy.jpg" else s for s in leaking.samples)
    run, store = RunDir(tmp_path / "run").create(), shared_at(tmp_path / "home").store
    write_candidates(run, CANDIDATES[1:2])
    record_near_copies(run, replace(leaking, samples=samples), store, threads=1)
    assert near_copies_in(run) == {}
    assert near_copies_sentence(run) == ()


def test_what_the_folds_found_among_their_test_images_is_told_once_of_the_whole_cross_validation(tmp_path: Path) -> None:
    study = RunDir(tmp_path / "folds").create()
    folds = [study.child(f"fold-{number}").create() for number in (1, 2, 3)]
    for number, fold in enumerate(folds[:2]):  # the third computed no features
        copies = [
            {"split": split, "file": f"{split}{number}.jpg", "copy_of": "a.jpg", "score": 0.98} for split in ("val", "test")
        ]
        write_json(fold.near_copies, {"candidates": 5, "compared": 4, "copies": copies})
    pool_near_copies(study, folds)
    assert near_copies_in(study) == {"cv": {"test0.jpg", "test1.jpg"}}
    (said,) = near_copies_sentence(study)
    assert said.startswith("Near duplicates of training images: 2 held-out images (test0.jpg is a.jpg; test1.jpg is a.jpg)")
    assert "Of 10 likely pairs 8 were compared" in said
    pool_near_copies(study, folds)
    assert [line["message"] for line in read_lines(study.events)] == [said], "a resumed study tells it once"


@pytest.mark.longer
@pytest.mark.usefixtures("one_torch_thread")
def test_cross_validation_gives_the_figures_without_the_copies_beside_the_others(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "data", {"a": 24, "b": 24})
    for number in range(4):
        (root / f"a/copy{number}.jpg").write_bytes(saved(picture(number), 60))
    run = RunDir(tmp_path / "runs" / "one")
    outcome = carry_out_at(tmp_path, tiny_spec(root, data={"folds": 3}, export={"register_model": "always"}), run)
    fold_of = {
        row.id: number
        for number in (1, 2, 3)
        for row in read_recorded_split(run.child(f"fold-{number}").split)
        if row.split == "test"
    }
    apart = {
        name for number in range(4) for name in (f"a/copy{number}.jpg", f"a/{number:02d}.jpg")
        if fold_of[f"a/copy{number}.jpg"] != fold_of[f"a/{number:02d}.jpg"]
    }  # fmt: skip
    assert apart, "the folds of this seed divide pairs"
    assert near_copies_in(run) == {"cv": apart}
    judged = read_evaluation(run.evaluation).evaluations
    assert (judged["cv"].n, judged["cv_unseen"].n) == (52, 52 - len(apart))
    assert len(Run(outcome.run).predictions("cv_unseen")) == 52 - len(apart)
    assert "Most confident mistakes (cv)" not in (outcome.run / "report.html").read_text(encoding="utf-8")
    assert outcome.metrics["cv_unseen/n"] == 52 - len(apart)
    assert outcome.cross_validation is not None
    folds = outcome.cross_validation["folds"]
    assert sum(fold["metrics"].get("test_unseen/n", fold["n_test"]) for fold in folds) == 52 - len(apart)
    assert "left out of the folds" in run.report.read_text()
    (said,) = [one for one in outcome.warnings if "held-out image" in one]
    assert said in Outcome.read(run).warnings
    assert html.escape(said.partition(" (")[0]) in run.report.read_text()


@pytest.mark.longer
@pytest.mark.usefixtures("one_torch_thread")
def test_a_job_gives_the_figures_without_the_copies_beside_the_others(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "data", {"train/a": 20, "train/b": 20, "val/a": 5, "val/b": 5, "test/a": 8, "test/b": 8})
    for number in range(3):
        (root / f"test/a/copy{number}.jpg").write_bytes(saved(picture(number), 60))
    run = RunDir(tmp_path / "runs" / "one")
    outcome = carry_out_at(tmp_path, tiny_spec(root, export={"register_model": "always"}), run)
    copies = {f"test/a/copy{number}.jpg" for number in range(3)}
    assert near_copies_in(run) == {"test": copies}
    judged = read_evaluation(run.evaluation).evaluations
    assert (judged["test"].n, judged["test_unseen"].n) == (19, 16)
    assert len(Run(outcome.run).predictions("test_unseen")) == 16
    assert outcome.metrics["test_unseen/n"] == 16
    (said,) = [one for one in outcome.warnings if one.startswith("Near duplicates of training images: 3 test images")]
    page = run.report.read_text()
    assert "Near duplicates of training images: 3 test images" in page
    assert "finetune check DATA --fix corrected.csv writes groups" in said
    assert said.endswith("with --set data.manifest=corrected.csv uses them")
