"""Drift: the statistics against scipy, how often they are wrong, and what a window and a reference remember."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from awkward import encoded
from PIL import Image, ImageFilter
from scipy import stats
from standin import write_bundle
from tiny_bundle import CLASSES, PREPROCESS, write_tiny_bundle

from finetune.bundle.manifest import DRIFT
from finetune.bundle.predictor import Predictor
from finetune.bundle.registry import Registry
from finetune.errors import BundleError
from finetune.evaluation.drift import reference_of
from finetune.evaluation.predictions import Predictions
from finetune.metrics.drift import (
    chi_square_survival,
    holm,
    homogeneity_test,
    ks_test,
    labels_test,
    population_stability_index,
)
from finetune.metrics.novelty import Subspace, fit_subspace
from finetune.monitoring.drift import ALPHA, MIN_WINDOW, compare, drift_of
from finetune.monitoring.monitored import ARRIVING, MAX_ARRIVING_FILES, MonitoredVersion, submit_statistics
from finetune.monitoring.reference import MAX_IMAGES, Reference, read_reference, write_reference
from finetune.monitoring.statistics import PredictionStatistics, concatenated, statistics_of
from finetune.monitoring.window import HOUR_SECONDS, HOURS, WINDOW_IMAGES, Window

N_CLASSES = 10


def drawn(chance: np.random.Generator, n: int, *, shift: float = 0.0, mix: np.ndarray | None = None) -> PredictionStatistics:
    """Answers of a made-up model to n images: sure of most, over ten classes."""
    shares = np.linspace(1, 3, N_CLASSES) if mix is None else mix
    return PredictionStatistics(
        chance.beta(6, 1.5, n).astype(np.float32) * np.float32(1 - shift),
        chance.choice(N_CLASSES, n, p=shares / shares.sum()).astype(np.int32),
        chance.gamma(4, 0.1 * (1 + shift), n).astype(np.float32),
    )


def given_labels(chance: np.random.Generator, n: int, more: float = 0.0) -> PredictionStatistics:
    """Answers of a made-up model with several labels, the first two of which come together."""
    given = chance.random((n, 6)) < np.linspace(0.1, 0.5, 6) + more
    given[:, 1] = given[:, 0]
    alike = drawn(chance, n)
    return PredictionStatistics(alike.confidence, np.zeros(n, np.int32), np.full(n, np.nan, np.float32), given)


# --- the statistics -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "m", "shift"), [(200, 341, 0.0), (200, 341, 0.3), (1000, 341, 0.15), (60, 50, 0.5), (1000, 5000, 0.1)]
)
def test_the_kolmogorov_smirnov_test_is_scipys(n: int, m: int, shift: float) -> None:
    chance = np.random.default_rng(n)
    reference, live = chance.normal(size=m), chance.normal(shift, 1.0, n)
    distance, p = ks_test(reference, live)
    expected = stats.ks_2samp(reference, live, method="exact")
    assert distance == pytest.approx(expected.statistic)
    assert p == pytest.approx(expected.pvalue, rel=0.1)  # asymptotic beside exact


def test_equal_samples_have_no_distance_and_far_ones_no_doubt() -> None:
    values = np.linspace(0, 1, 300)
    assert ks_test(values, values) == (0.0, 1.0)
    assert ks_test(values, values + 2)[0] == 1.0
    assert ks_test(values, values + 2)[1] < 1e-12


@pytest.mark.parametrize("degrees", [1, 2, 3, 9, 10, 99, 999])
def test_the_tail_of_chi_square_is_scipys(degrees: int) -> None:
    for value in (0.0, 0.1, 0.5 * degrees, degrees, 1.3 * degrees, 3.0 * degrees):
        assert chi_square_survival(value, degrees) == pytest.approx(stats.chi2.sf(value, degrees), rel=1e-9, abs=1e-15)


def test_counts_by_class_are_compared_as_scipy_does() -> None:
    first, second = np.array([50, 60, 70, 0]), np.array([30, 20, 50, 0])
    expected = stats.chi2_contingency([first[:3], second[:3]], correction=False)
    assert homogeneity_test(first, second) == pytest.approx((expected.statistic, expected.pvalue))


def test_small_counts_are_compared_with_random_tables_of_the_same_margins() -> None:
    first, second = np.array([12, 3, 1]), np.array([4, 8, 2])
    chance = np.random.default_rng(1)
    tables = chance.multivariate_hypergeometric(first + second, int(second.sum()), size=20_000)
    statistics = [stats.chi2_contingency([first + second - row, row], correction=False).statistic for row in tables[:4000]]
    statistic, p = homogeneity_test(first, second)
    assert statistic == pytest.approx(stats.chi2_contingency([first, second], correction=False).statistic)
    assert p == pytest.approx(np.mean(np.array(statistics) >= statistic - 1e-9), abs=0.02)
    assert homogeneity_test(first, second) == (statistic, p), "the same counts give the same p-value"
    assert homogeneity_test(np.array([0, 5]), np.array([0, 9])) == (0.0, 1.0)


def test_each_label_is_compared_with_fishers_exact_test() -> None:
    reference, live = np.array([10, 100, 3, 0]), np.array([20, 61, 2, 0])
    expected = min(stats.fisher_exact([[a, 341 - a], [b, 200 - b]]).pvalue for a, b in zip(reference, live, strict=True))
    difference, p = labels_test(reference, 341, live, 200)
    assert p == pytest.approx(4 * expected)
    assert difference == pytest.approx(0.1 - 10 / 341)


def test_p_values_are_adjusted_as_holm_did() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([0.9, 0.9]) == (1.0, 1.0)


def test_the_stability_index_of_equal_shares_is_nought_on_average_for_any_number_of_classes() -> None:
    chance = np.random.default_rng(0)
    for n_classes in (3, 30, 100):
        shares = np.full(n_classes, 1 / n_classes)
        found = [population_stability_index(chance.multinomial(341, shares), chance.multinomial(200, shares)) for _ in range(50)]
        assert np.mean(found) < 0.1, n_classes
    first, second = np.array([500, 500]), np.array([800, 200])
    assert population_stability_index(first, second) == pytest.approx(0.3 * np.log(1.6) + 0.3 * np.log(2.5), abs=0.01)


# --- how often it is wrong ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [drawn, given_labels])
def test_windows_of_the_same_kind_raise_an_alarm_in_less_than_one_of_a_hundred(
    make: Callable[[np.random.Generator, int], PredictionStatistics],
) -> None:
    chance = np.random.default_rng(7)
    rounds, alarms = 300, 0
    for number in range(rounds):
        reference = Reference("test", make(chance, 341))
        live = make(chance, 200 if number % 2 else WINDOW_IMAGES)
        alarms += any(test.drifted for test in compare(reference, live))
    assert alarms / rounds <= 0.01


def test_a_shift_of_each_kind_is_found_and_named() -> None:
    chance = np.random.default_rng(3)
    reference = Reference("test", drawn(chance, 341))
    mix = np.linspace(3, 1, N_CLASSES) ** 2
    found = {
        name: [test.name for test in compare(reference, live) if test.drifted]
        for name, live in {
            "the same": drawn(chance, WINDOW_IMAGES),
            "classes": drawn(chance, WINDOW_IMAGES, mix=mix),
            "blurred": drawn(chance, MIN_WINDOW, shift=0.4),
        }.items()
    }
    assert found == {"the same": [], "classes": ["classes"], "blurred": ["confidence", "embedding"]}
    several = Reference("test", given_labels(chance, 341))
    assert [test.name for test in compare(several, given_labels(chance, 400, more=0.3)) if test.drifted] == [
        "labels",
        "labels_per_image",
    ]


def test_with_many_images_a_small_difference_is_significant_and_no_drift() -> None:
    chance = np.random.default_rng(5)
    reference = Reference("test", drawn(chance, MAX_IMAGES))
    tests = {test.name: test for test in compare(reference, drawn(chance, MAX_IMAGES, shift=0.02))}
    assert tests["confidence"].adjusted_p < ALPHA
    assert tests["confidence"].effect < tests["confidence"].threshold
    assert not any(test.drifted for test in tests.values())


def photographs(chance: np.random.Generator, n: int, change: Callable[[Image.Image], Image.Image]) -> list[bytes]:
    found = []
    for _ in range(n):
        noise = chance.integers(0, 256, (8, 10, 3), np.uint8)
        photo = Image.fromarray(noise).resize((80, 64), Image.Resampling.NEAREST)
        found.append(encoded(change(photo), "JPEG", quality=90))
    return found


def test_blurred_and_darkened_photographs_are_found_with_a_bundle_and_sharp_ones_are_not(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    predictor = Predictor.load(tmp_path / "bundle")
    chance = np.random.default_rng(11)

    def outputs(n: int, change: Callable[[Image.Image], Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        images = np.stack([PREPROCESS.load(data) for data in photographs(chance, n, change)])
        found = predictor.run(images)
        return found.probs, found.embedding

    _, known = outputs(200, lambda photo: photo)
    subspace = fit_subspace(known)

    def answers(n: int, change: Callable[[Image.Image], Image.Image]) -> PredictionStatistics:
        return statistics_of("multiclass", *outputs(n, change), subspace)

    reference = Reference("test", answers(300, lambda photo: photo))
    changes: dict[str, Callable[[Image.Image], Image.Image]] = {
        "sharp": lambda photo: photo,
        "blurred": lambda photo: photo.filter(ImageFilter.GaussianBlur(6)),
        "dark": lambda photo: photo.point(lambda level: level // 4),
    }
    drifted = {
        name: any(test.drifted for test in compare(reference, answers(MIN_WINDOW, change))) for name, change in changes.items()
    }
    assert drifted == {"sharp": False, "blurred": True, "dark": True}


# --- window ---------------------------------------------------------------------------------------


def test_a_window_holds_the_newest_answers_in_their_order_however_they_come() -> None:
    chance = np.random.default_rng(0)
    everything = drawn(chance, 2_750)
    window = Window("a" * 64, N_CLASSES, several=False)
    for begin, end in ((0, 1), (1, 700), (700, 2_300), (2_300, 2_750)):
        part = PredictionStatistics(everything.confidence[begin:end], everything.label[begin:end], everything.distance[begin:end])
        window.add(part, 0.0)
    assert (len(window), window.n_seen) == (WINDOW_IMAGES, 2_750)
    assert window.statistics().confidence.tolist() == everything.last(WINDOW_IMAGES).confidence.tolist()
    assert window.statistics().label.tolist() == everything.last(WINDOW_IMAGES).label.tolist()


def test_hours_are_sums_and_only_the_last_ones_stay() -> None:
    window = Window("a" * 64, N_CLASSES, several=False, unlike_beyond=0.5)
    answers = PredictionStatistics(np.array([0.5, 1.0], np.float32), np.array([0, 1], np.int32), np.array([0.4, 0.6], np.float32))
    for hour in range(HOURS + 5):
        window.add(answers, hour * HOUR_SECONDS + 17.0)
    window.add(answers, (HOURS + 4) * HOUR_SECONDS + 99.0)
    hours = drift_of(None, window).hours
    assert [hour.at for hour in hours] == [hour * HOUR_SECONDS for hour in range(5, HOURS + 5)]
    assert [(hour.n, hour.mean_confidence, hour.unlike_share) for hour in hours[-2:]] == [(2, 0.75, 0.5), (4, 0.75, 0.5)]


@pytest.mark.parametrize("several", [False, True])
def test_a_window_is_read_as_it_was_written_and_not_for_another_model(tmp_path: Path, several: bool) -> None:
    chance = np.random.default_rng(0)
    n_classes = 6 if several else N_CLASSES
    make = given_labels if several else drawn
    window = Window("a" * 64, n_classes, several=several)
    window.add(make(chance, 1_300), 7_200.0)
    window.alarm.since = 12.5
    window.write(tmp_path / "window.npz")
    again = Window("a" * 64, n_classes, several=several)
    again.read(tmp_path / "window.npz")
    assert (again.n_seen, again.alarm, again.hours) == (window.n_seen, window.alarm, window.hours)
    first, second = window.statistics(), again.statistics()
    assert first.confidence.tolist() == second.confidence.tolist()
    assert np.array_equal(first.given, second.given) if several else second.given is None
    for other in (Window("b" * 64, n_classes, several=several), Window("a" * 64, 7, several=not several)):
        other.read(tmp_path / "window.npz")
        assert other.n_seen == 0
    (tmp_path / "window.npz").write_bytes(b"PK damaged")
    again.read(tmp_path / "window.npz")
    assert again.n_seen == window.n_seen, "a damaged file changes nothing"


def test_what_other_processes_leave_is_taken_in_once(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "models")
    version = registry.register(write_bundle(tmp_path / "bundle"), "colours")
    folder = registry.monitoring_of("colours", version.version)
    watched = MonitoredVersion(version.path, folder)
    sha256 = watched.window.model_sha256
    answers = PredictionStatistics(np.full(30, 0.9, np.float32), np.ones(30, np.int32), np.full(30, np.nan, np.float32))
    submit_statistics(registry, version, "batch-1", answers, sha256, 7_200.0)
    submit_statistics(
        registry, version, "batch-1", answers, sha256, 7_200.0
    )  # the same job, killed before it said that it was done
    submit_statistics(registry, version, "of-another-model", answers, "f" * 64, 7_200.0)
    (folder / ARRIVING / "damaged.npz").write_bytes(b"PK")
    assert (watched.collect(), watched.window.n_seen) == (30, 30)
    assert (watched.collect(), list((folder / ARRIVING).iterdir())) == (0, [])
    for number in range(MAX_ARRIVING_FILES + 3):
        submit_statistics(registry, version, f"batch-{number}", answers, sha256, 7_200.0)
    assert len(list((folder / ARRIVING).iterdir())) == MAX_ARRIVING_FILES
    registry.delete("colours", force=True)
    submit_statistics(registry, version, "late", answers, sha256, 7_200.0)
    assert not folder.exists()


# --- reference ------------------------------------------------------------------------------------


def table(chance: np.random.Generator, n: int, split: str = "test") -> Predictions:
    logits = chance.normal(0, 3, (n, len(CLASSES))).astype(np.float32)
    embedding = chance.normal(0, 1, (n, 32)).astype(np.float32) * np.linspace(0.1, 2, 32, dtype=np.float32)
    ids = tuple(str(number) for number in range(n))
    return Predictions(split, "multiclass", CLASSES, ids, np.zeros((n, 32), np.uint8), None, logits, embedding)


def test_a_reference_is_what_the_table_of_predictions_says(tmp_path: Path) -> None:
    predictions = table(np.random.default_rng(0), 120)
    assert predictions.embedding is not None
    subspace = fit_subspace(predictions.embedding[:60])
    reference = reference_of(predictions, 2.0, subspace)
    assert reference is not None
    halved = np.exp(predictions.logits.astype(np.float64) / 2)
    expected = halved / halved.sum(axis=1, keepdims=True)
    assert reference.statistics.confidence == pytest.approx(expected.max(axis=1), rel=1e-6)
    assert reference.statistics.label.tolist() == expected.argmax(axis=1).tolist()
    assert reference.statistics.distance == pytest.approx(subspace.distances(predictions.embedding), rel=1e-6)
    write_reference(tmp_path / DRIFT, reference)
    again = read_reference(tmp_path / DRIFT)
    assert again is not None
    assert (again.split, again.statistics.confidence.tolist()) == ("test", reference.statistics.confidence.tolist())
    assert reference.without_distances().distances is None


def test_images_that_the_subspace_was_fitted_to_are_measured_from_one_that_was_fitted_without_them() -> None:
    predictions = table(np.random.default_rng(0), 200, "val")
    assert predictions.embedding is not None
    subspace = fit_subspace(predictions.embedding)
    inside = subspace.distances(predictions.embedding)
    reference = reference_of(predictions, 1.0, subspace, fitted_on_these=True)
    assert reference is not None
    assert reference.distances is not None
    assert reference.distances.mean() > inside.mean()


def test_too_few_or_unusable_answers_give_no_reference_and_many_are_thinned() -> None:
    chance = np.random.default_rng(0)
    assert reference_of(table(chance, 19), 1.0, None) is None
    broken = table(chance, 50)
    broken.logits[3, 1] = np.nan
    assert reference_of(broken, 1.0, None) is None
    many = reference_of(table(chance, MAX_IMAGES + 500), 1.0, None)
    assert many is not None
    assert len(many) == MAX_IMAGES
    assert many.distances is None


def test_the_reference_is_a_file_of_the_bundle_with_its_checksum(tmp_path: Path) -> None:
    reference = Reference("val", drawn(np.random.default_rng(0), 50))
    bundle = write_bundle(
        tmp_path / "bundle", subspace=Subspace(np.zeros(3, np.float32), np.zeros((0, 3), np.float32)), reference=reference
    )
    assert DRIFT in Predictor.load(bundle).manifest.files
    assert read_reference(write_bundle(tmp_path / "old") / DRIFT) is None
    (bundle / DRIFT).write_bytes(b"PK")
    with pytest.raises(BundleError, match=r"drift\.npz: has sha256"):
        Predictor.load(bundle)
    with pytest.raises(BundleError, match=r"drift\.npz cannot be read"):
        read_reference(bundle / DRIFT)


def test_the_state_is_said_in_a_sentence() -> None:
    chance = np.random.default_rng(0)
    reference, window = Reference("val", drawn(chance, 341)), Window("a" * 64, N_CLASSES, several=False)
    window.add(drawn(chance, 37), 0.0)
    assert drift_of(None, window).state == "no_reference"
    collecting = drift_of(reference, window)
    assert (collecting.state, collecting.sentence) == ("collecting", "Not enough yet: 37 of 200 images")
    window.add(drawn(chance, 463), 0.0)
    steady = drift_of(reference, window)
    assert (steady.state, steady.reference_split, steady.reference_n) == ("steady", "val", 341)
    assert "between the last 500 images and the 341 val images" in steady.sentence
    window.add(drawn(chance, 900, shift=0.5), 0.0)
    drifted = drift_of(reference, window)
    assert drifted.state == "drifted"
    assert drifted.sentence.endswith("differ in how sure it is and how unlike known images the pictures are")


def test_answers_are_put_together_in_their_order() -> None:
    chance = np.random.default_rng(0)
    parts = [given_labels(chance, n) for n in (3, 1, 2)]
    whole = concatenated(parts)
    assert whole.given is not None
    assert len(whole) == 6
    assert whole.given[3].tolist() == parts[1].given[0].tolist()  # type: ignore[index]
