"""The labels study: laws that are known are foreseen, and what cannot be told is said."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_runs import shared_at, tiny_spec, write_stripes

from finetune.data.dataset import LocalFile, Sample
from finetune.errors import InvalidInput
from finetune.studies.labels.curve import Estimate, LearningCurve, nested, training_sizes
from finetune.studies.labels.study import (
    LabelsStudy,
    Projection,
    Weighting,
    measured,
    points,
    rows_of,
    study_labels,
    write_page,
)
from finetune.tasks import task_named

TOP1, PER_CLASS, MEAN_AP = "top1", "mean_per_class_accuracy", "map"
SIZES = (100, 164, 270, 443, 728, 1200)


def drawn(a: float, b: float, c: float, *, seed: int = 0, repeats: int = 8, n_held_out: int = 300) -> LearningCurve:
    """Return a curve as measured under a known law; the held-out images of one repetition are the same at every size."""
    rng = np.random.default_rng(seed)
    errors = []
    for _ in range(repeats):
        difficulty = rng.uniform(size=n_held_out)
        errors.append([float((difficulty < a + b * n**-c).mean()) + rng.normal(0, 0.002) for n in SIZES])
    return LearningCurve(SIZES, np.array(errors), 0.25)


@pytest.mark.parametrize(("a", "b", "c"), [(0.05, 2.0, 0.5), (0.0, 0.8, 0.25), (0.1, 8.0, 0.8)])
def test_what_doubling_brings_lies_in_the_interval(a: float, b: float, c: float) -> None:
    truth = b * (1200.0**-c - 2400.0**-c)
    held = 0
    for seed in range(20):
        gain = drawn(a, b, c, seed=seed).gain(1200, 2400)
        assert gain.low <= gain.value <= gain.high
        held += gain.low <= truth <= gain.high
    assert held >= 18


def test_where_more_images_bring_nothing_no_gain_is_promised() -> None:
    gain = drawn(0.2, 0.0, 0.5).gain(1200, 2400)
    assert gain.low < 0.001
    assert gain.value < 0.005


def test_more_repetitions_and_more_images_make_the_interval_narrower() -> None:
    few, many = drawn(0.05, 2.0, 0.5, repeats=4, n_held_out=100), drawn(0.05, 2.0, 0.5, repeats=16, n_held_out=3000)
    widths = [gain.high - gain.low for gain in (few.gain(1200, 2400), many.gain(1200, 2400))]
    assert widths[1] < widths[0]


def test_what_follows_no_law_is_told_from_what_does() -> None:
    assert drawn(0.05, 2.0, 0.5).fits
    jumping = replace(drawn(0.05, 2.0, 0.5), errors=drawn(0.05, 2.0, 0.5).errors + np.array([0, 0.15, 0, 0.15, 0, 0.15]))
    assert not jumping.fits


def test_growing_parts_lie_in_one_another_with_the_classes_in_proportion() -> None:
    labels = np.repeat([0, 1, 2], [300, 60, 12])
    parts = nested(labels, (31, 93, 372), np.random.default_rng(0))
    assert [len(part) for part in parts] == [31, 93, 372]
    for smaller, larger in pairwise(parts):
        assert set(smaller) <= set(larger)
    assert np.bincount(labels[parts[1]]) == pytest.approx([75, 15, 3], abs=2)
    assert (np.bincount(labels[parts[0]], minlength=3) > 0).all()


def test_sizes_grow_in_equal_ratios_up_to_all_images() -> None:
    sizes = training_sizes(1200, 10, 6)
    assert sizes[-1] == 1200
    assert np.diff(np.log(sizes)) == pytest.approx(np.log(12) / 5, rel=0.02)
    assert training_sizes(50, 10, 6) == (), "too few images of each class"


def clusters(n: int, n_classes: int = 3, n_features: int = 24, seed: int = 0) -> tuple[NDArray[np.float32], tuple[Sample, ...]]:
    """Features that a linear head learns better and better, and samples without files."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    features = rng.normal(0, 1, (n_classes, n_features))[labels] * 0.5 + rng.normal(0, 1, (n, n_features))
    samples = tuple(
        Sample(str(row), LocalFile(Path(str(row))), int(label), sha256=f"{row:064x}") for row, label in enumerate(labels)
    )
    return features.astype(np.float32), samples


def test_a_curve_is_measured_on_images_that_were_held_out() -> None:
    features, samples = clusters(400)
    curves = measured(features, samples, 3, seed=0, repeats=3, sizes=4)
    assert curves is not None
    assert set(curves) == {TOP1, PER_CLASS}
    curve = curves[TOP1]
    assert curve.errors.shape == (3, 4)
    assert curve.mean[0] > curve.mean[-1] > 0.05, "a head that had seen them would be right"
    again = measured(features, samples, 3, seed=0, repeats=3, sizes=4)
    assert again is not None
    assert np.array_equal(again[TOP1].errors, curve.errors)


def test_what_belongs_together_is_held_out_together() -> None:
    """Labels that are chance, each image twice: without groups a head would know the second by the first."""
    rng = np.random.default_rng(0)
    features = np.repeat(rng.normal(size=(150, 200)), 2, axis=0).astype(np.float32)
    labels = np.repeat(rng.integers(0, 2, 150), 2)
    samples = [
        Sample(str(row), LocalFile(Path(str(row))), int(label), group=str(row // 2), sha256=f"{row:064x}")
        for row, label in enumerate(labels)
    ]
    apart = measured(features, [replace(sample, group=None) for sample in samples], 2, 0, 3, 4)
    together = measured(features, samples, 2, 0, 3, 4)
    assert apart is not None
    assert together is not None
    assert together[TOP1].mean[-1] > 0.4
    assert apart[TOP1].mean[-1] < 0.35


def study(*projections: tuple[float, float, float], fits: bool = True) -> LabelsStudy:
    curve = drawn(0.05, 2.0, 0.5)
    if not fits:
        curve = replace(curve, errors=curve.errors + np.array([0, 0.15, 0, 0.15, 0, 0.15]))
    found = tuple(
        Projection(100 * number, 1200 + 300 * number, Estimate(*gain), Estimate(0.9, 0.88, 0.92))
        for number, gain in enumerate(projections, start=1)
    )
    return LabelsStudy(
        "photos", "0" * 64, "tiny", 1500, {"cat": 800, "dog": 700}, "multiclass", TOP1, {TOP1: curve, PER_CLASS: curve}, found
    )


def test_the_sentence_says_what_is_certain_and_what_is_not() -> None:
    assert study((0.014, 0.006, 0.026)).sentence == "100 more images per class would help: +1.4 points, 0.6 to 2.6."
    assert study((0.001, 0.0, 0.003)).sentence.startswith("100 more images per class would hardly help")
    assert study((0.01, 0.0, 0.03)).sentence.startswith(
        "It is uncertain whether 100 more images per class would gain 0.5 points or more"
    )
    assert study((0.014, 0.006, 0.026), fits=False).verdict == "cannot tell"
    assert points(-0.0123) == "−1.2"


def test_the_page_holds_the_curve_and_loads_nothing(tmp_path: Path) -> None:
    found = write_page(
        tmp_path / "page.html", study((0.008, 0.002, 0.014), (0.014, 0.006, 0.026)), "finetune study labels photos"
    )
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert found.sentence in page
    assert "data:image/svg+xml" in page
    assert "://" not in page.replace("http://www.w3.org", "")
    assert all(cell in page for row in rows_of(found) for cell in row)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["verdict"] == "helps"
    assert len(document["curves"][TOP1]["repetitions"]) == 8


def test_amounts_that_cannot_be_foreseen_are_refused_and_left_out_beside_others(tmp_path: Path) -> None:
    spec, shared = tiny_spec(write_stripes(tmp_path / "many", 45)), shared_at(tmp_path / "home")
    with pytest.raises(InvalidInput, match="ask for at most"):
        study_labels(spec, shared, more=[100_000], repeats=2, sizes=4)
    with pytest.raises(InvalidInput, match="at least 1"):
        study_labels(spec, shared, more=[0])
    found = study_labels(spec, shared, more=[10, 100_000], repeats=2, sizes=4)
    assert found.n_images == 45
    assert [one.n_train for one in found.projections] == [found.curve.sizes[-1] + 30]
    assert found.too_far == (100_000,)


def test_too_few_images_make_no_curve() -> None:
    features, samples = clusters(12)
    assert measured(features, samples, 3, seed=0) is None


# ── several labels per image, and weights of classes ──────────────────────────────────────────────


def test_images_with_several_labels_have_a_curve_of_their_average_precision(tmp_path: Path) -> None:
    features, samples = clusters(400)
    rng = np.random.default_rng(1)
    several = [
        replace(sample, target=tuple(sorted({*sample.labels, *np.flatnonzero(rng.random(3) < 0.1).tolist()})))
        for sample in samples
    ]
    curves = measured(features, several, 3, 0, 3, 4, weighting=Weighting(task_named("multilabel")))
    assert curves is not None
    assert set(curves) == {MEAN_AP}
    curve = curves[MEAN_AP]
    assert 0.05 < curve.mean[-1] < curve.mean[0] < 0.7
    projection = Projection(100, 420, curve.gain(320, 420), curve.error(420), per_class=False)
    found = LabelsStudy("photos", "0" * 64, "tiny", 400, {"a": 9}, "multilabel", MEAN_AP, curves, (projection,))
    assert "100 more images" in found.sentence
    assert "a class" not in found.sentence
    assert found.to_dict()["projections"][0]["more_images"] == 100
    page = write_page(tmp_path / "page.html", found, "finetune study labels photos").page
    assert page is not None
    assert "mean average precision" in page.read_text(encoding="utf-8")


def test_balanced_weights_raise_the_mean_over_unequal_classes() -> None:
    features, samples = clusters(1200, n_classes=2)
    rare = [sample for row, sample in enumerate(samples) if sample.target == 0 or row % 12 == 0]
    rows = [int(sample.id) for sample in rare]
    errors = {}
    for weights in ("none", "balanced"):
        curves = measured(features[rows], rare, 2, 0, 3, 4, weighting=Weighting(task_named("multiclass"), weights))  # type: ignore[arg-type]
        assert curves is not None
        errors[weights] = curves[PER_CLASS].mean[-1]
    assert errors["balanced"] < errors["none"] - 0.02
