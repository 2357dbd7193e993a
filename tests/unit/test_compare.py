"""Arms compared on the same images: the tests are the textbook's, and what is claimed is rarely wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from finetune.errors import InvalidInput
from finetune.evaluation import paired
from finetune.evaluation.compare import (
    ArmPredictions,
    compare_pairs,
    holm,
    images_needed,
)
from finetune.evaluation.paired import mcnemar_exact, mcnemar_mid_p
from finetune.evaluation.predictions import Predictions

CLASSES = ("a", "b", "c")


def table(right: np.ndarray, targets: np.ndarray, sureness: float = 2.0) -> Predictions:
    """Answers that are right where `right` says so, else the next class."""
    n = len(targets)
    logits = np.zeros((n, len(CLASSES)), np.float32)
    logits[np.arange(n), np.where(right, targets, (targets + 1) % len(CLASSES))] = sureness
    ids = tuple(map(str, range(n)))
    return Predictions("test", "multiclass", CLASSES, ids, np.zeros((n, 32), np.uint8), targets.astype(np.int64), logits)


def arm(name: str, *runs: np.ndarray, targets: np.ndarray, **given: object) -> ArmPredictions:
    return ArmPredictions(name, tuple(table(run, targets) for run in runs), **given)  # type: ignore[arg-type]


def simulated(
    rng: np.random.Generator, n: int, *, runs: int, accuracy: float, lead: float, correlation: float, seed_sd: float
) -> list[ArmPredictions]:
    """Two arms over the same images, some of which are hard for both; the first is better by `lead`."""
    hardness, targets = rng.normal(size=n), rng.integers(0, len(CLASSES), n)
    arms = []
    for name, mean in (("first", accuracy + lead), ("second", accuracy)):
        tables = []
        for _ in range(runs):
            share = float(np.clip(mean + seed_sd * rng.normal(), 0.01, 0.99))
            score = math.sqrt(correlation) * hardness + math.sqrt(1 - correlation) * rng.normal(size=n)
            tables.append(score < stats.norm.ppf(share))
        arms.append(arm(name, *tables, targets=targets))
    return arms


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 1), (12, 12), (30, 17), (3, 40), (2600, 2400), (0, 5000)])
def test_the_exact_test_is_scipys_and_the_mid_p_value_is_the_one_between_its_neighbours(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    exact = 1.0 if n == 0 else stats.binomtest(only_a, n).pvalue
    assert mcnemar_exact(only_a, only_b) == pytest.approx(exact)
    mid_p = mcnemar_mid_p(only_a, only_b)
    if only_a == only_b:
        assert mid_p == 1.0
    else:
        # Fagerland, Lydersen & Laake (2013): the exact p value without half the probability of what was observed, on both sides
        assert mid_p == pytest.approx(exact - stats.binom.pmf(min(only_a, only_b), n, 0.5))
    assert mid_p == mcnemar_mid_p(only_b, only_a)


def test_the_published_example_of_the_mid_p_test() -> None:
    """Fagerland, Lydersen & Laake (2013), table 2: airway hyper-responsiveness, 1 and 7 discordant pairs."""
    assert mcnemar_exact(1, 7) == pytest.approx(0.0703, abs=5e-5)
    assert mcnemar_mid_p(1, 7) == pytest.approx(0.0391, abs=5e-5)


def test_holm_multiplies_step_by_step_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_a_pair_says_how_often_each_arm_alone_is_right() -> None:
    targets = np.zeros(100, np.int64)
    first, second = np.ones(100, bool), np.ones(100, bool)
    second[:12], first[90:93] = False, False
    (pair,) = compare_pairs([arm("first", first, targets=targets), arm("second", second, targets=targets)])
    assert (pair.only_a, pair.only_b, pair.n, pair.test) == (12.0, 3.0, 100, "mcnemar mid-p")
    assert pair.headline.difference == pytest.approx(0.09)
    assert pair.p_value == pytest.approx(mcnemar_mid_p(12, 3))
    assert pair.headline.low < 0.09 < pair.headline.high
    assert (pair.winner, pair.outcome) == ("first", "better")


def test_the_interval_of_paired_proportions_is_bonett_and_prices() -> None:
    targets = np.zeros(50, np.int64)
    first, second = np.ones(50, bool), np.ones(50, bool)
    second[:6], first[40:42] = False, False
    (pair,) = compare_pairs([arm("first", first, targets=targets), arm("second", second, targets=targets)])
    p12, p21, n = (6 + 1) / 52, (2 + 1) / 52, 52
    assert pair.headline.standard_error == pytest.approx(math.sqrt((p12 + p21 - (p12 - p21) ** 2) / n))


def test_arms_that_answer_alike_are_not_equivalent_until_enough_images_say_so() -> None:
    for n, equivalent in ((50, False), (150, False), (3000, True)):
        targets = np.zeros(n, np.int64)
        right = np.arange(n) % 10 > 0
        (pair,) = compare_pairs([arm("first", right, targets=targets), arm("second", right, targets=targets)])
        assert pair.headline.difference == 0
        assert pair.headline.low < 0 < pair.headline.high, "an interval of width zero would claim to know everything"
        assert (pair.outcome == "equivalent") is equivalent


def test_the_wider_the_margin_the_sooner_two_arms_are_equivalent() -> None:
    targets = np.zeros(400, np.int64)
    right = np.arange(400) % 10 > 0
    arms = [arm("first", right, targets=targets), arm("second", right, targets=targets)]
    assert [compare_pairs(arms, margin)[0].outcome for margin in (0.005, 0.05)] == ["undecided", "equivalent"]


def test_seeds_that_disagree_widen_the_interval_and_a_single_run_borrows_their_spread() -> None:
    rng = np.random.default_rng(0)
    targets = np.zeros(1000, np.int64)
    steady = [rng.random(1000) < 0.9 for _ in range(3)]
    jumping = [rng.random(1000) < share for share in (0.82, 0.9, 0.98)]
    reference = [rng.random(1000) < 0.9 for _ in range(3)]
    errors = {}
    for name, runs in (("steady", steady), ("jumping", jumping), ("single", jumping[:1])):
        arms = [arm(name, *runs, targets=targets), arm("reference", *reference, targets=targets)]
        errors[name] = compare_pairs(arms)[0].headline
    assert errors["jumping"].standard_error > 2 * errors["steady"].standard_error
    assert errors["jumping"].seed_share > 0.5
    assert errors["jumping"].degrees_of_freedom < 5
    assert errors["single"].standard_error > errors["steady"].standard_error


def test_folds_are_tested_as_nadeau_and_bengio_do() -> None:
    rng = np.random.default_rng(1)
    n, k, n_train = 200, 5, 160
    folds = np.repeat(np.arange(k), n // k)
    targets = np.zeros(n, np.int64)
    first, second = rng.random(n) < 0.95, rng.random(n) < 0.8
    arms = [
        arm(name, right, targets=targets, folds=tuple(folds.tolist()), n_train=n_train)
        for name, right in (("first", first), ("second", second))
    ]
    (pair,) = compare_pairs(arms)
    means = [(first[folds == fold].astype(float) - second[folds == fold]).mean() for fold in range(k)]
    error = math.sqrt(np.var(means, ddof=1) * (1 / k + (n / k) / n_train))
    assert pair.test == "corrected resampled t"
    assert pair.headline.standard_error == pytest.approx(error)
    assert pair.p_value == pytest.approx(2 * stats.t.sf(abs(np.mean(means)) / error, k - 1))


def test_other_metrics_come_with_intervals_from_resampled_images() -> None:
    rng = np.random.default_rng(2)
    arms = simulated(rng, 400, runs=1, accuracy=0.7, lead=0.2, correlation=0.5, seed_sd=0.0)
    (pair,) = compare_pairs(arms)
    others = {other.metric: other for other in pair.others}
    assert set(others) == {"macro_f1", "loss", "ece"}
    assert others["macro_f1"].low > 0
    assert others["loss"].high < 0, "the loss of the better arm is lower"
    assert pair == compare_pairs(arms)[0], "the bootstrap has a seed"


def test_arms_of_other_images_are_refused() -> None:
    targets = np.zeros(4, np.int64)
    right = np.ones(4, bool)
    other = table(right, targets).take([0, 1, 3, 2])
    with pytest.raises(InvalidInput, match="have no predictions for the same images"):
        compare_pairs([arm("first", right, targets=targets), ArmPredictions("second", (other,))])
    with pytest.raises(InvalidInput, match="at least two arms"):
        compare_pairs([arm("first", right, targets=targets)])
    with pytest.raises(InvalidInput, match="no finished run"):
        ArmPredictions("empty", ())


def test_images_needed_grow_with_the_square_of_what_is_to_be_shown() -> None:
    arms = simulated(np.random.default_rng(3), 200, runs=1, accuracy=0.8, lead=0.05, correlation=0.5, seed_sd=0.0)
    (pair,) = compare_pairs(arms)
    assert images_needed(pair, pair.smallest_detectable) == pytest.approx(200, abs=1)
    assert images_needed(pair, pair.smallest_detectable / 2) == pytest.approx(800, abs=2)


@pytest.mark.parametrize(("n", "runs", "seed_sd"), [(150, 1, 0.0), (400, 3, 0.01)])
def test_claims_are_rarely_wrong_and_what_is_said_to_be_detectable_is_detected(
    n: int, runs: int, seed_sd: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small copy of benchmarks/comparison_claims.py; the seeds are fixed, so this never fails by chance."""
    monkeypatch.setattr(paired, "RESAMPLINGS", 1)
    rng = np.random.default_rng(4)
    rounds = 150
    same = {"accuracy": 0.9, "correlation": 0.5, "seed_sd": seed_sd, "runs": runs}
    null = [compare_pairs(simulated(rng, n, lead=0.0, **same))[0] for _ in range(rounds)]
    assert sum(pair.significant for pair in null) <= 0.05 * rounds
    lead = float(np.mean([pair.smallest_detectable for pair in null]))
    better = [compare_pairs(simulated(rng, n, lead=lead, **{**same, "accuracy": 0.97 - lead}))[0] for _ in range(rounds)]
    assert sum(pair.winner == "first" for pair in better) >= 0.8 * rounds
    at_margin = [compare_pairs(simulated(rng, n, lead=0.05, **{**same, "accuracy": 0.85}), 0.05)[0] for _ in range(rounds)]
    assert sum(pair.outcome == "equivalent" for pair in at_margin) <= 0.05 * rounds
