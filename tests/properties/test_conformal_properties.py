"""Conformal quantiles, abstention and novelty: what they promise holds, whatever the scores."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.evaluation.selective import RISK, operating_point
from finetune.metrics.conformal import class_thresholds, conformal_quantile, conformal_rank, coverage_threshold
from finetune.metrics.novelty import fit_subspace, held_out_distances

LEVEL = st.integers(1, 99).map(lambda percent: percent / 100)
SCORES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60).map(np.array)


@given(SCORES, LEVEL)
def test_the_quantile_is_the_smallest_score_that_enough_scores_do_not_exceed(scores: np.ndarray, level: float) -> None:
    quantile = conformal_quantile(scores, level)
    needed = (len(scores) + 1) * level
    if quantile is None:
        assert needed > len(scores)
        return
    assert quantile in scores
    assert (scores <= quantile).sum() >= needed - 1e-6
    assert (scores < quantile).sum() < max(needed, 1.0)


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=40, unique=True), LEVEL)
def test_leaving_each_score_out_in_turn_covers_at_least_the_level(values: list[int], level: float) -> None:
    """Exchangeability in its exact form: of all n + 1 choices of the new score, at least level (n + 1) are covered."""
    scores = np.array(values, np.float64)
    covered = 0
    for index, score in enumerate(scores):
        quantile = conformal_quantile(np.delete(scores, index), level)
        covered += quantile is None or score <= quantile
    assert covered >= level * len(scores) - 1e-6
    n = len(scores) - 1
    if conformal_rank(n, level) <= n:  # and never more than one score too many
        assert covered <= level * len(scores) + 1


@given(SCORES, LEVEL, LEVEL)
def test_more_coverage_never_asks_more_of_a_label(scores: np.ndarray, one: float, other: float) -> None:
    lower, higher = sorted((one, other))
    loose, strict = coverage_threshold(scores, higher), coverage_threshold(scores, lower)
    assert loose is None or (strict is not None and loose <= strict)


@given(st.integers(1, 2000), LEVEL)
def test_a_rank_is_not_changed_by_rounding(n: int, level: float) -> None:
    percent = round(level * 100)
    assert conformal_rank(n, level) == max(1, -(-(n + 1) * percent // 100))


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=50), LEVEL)
def test_each_class_has_the_threshold_of_its_own_images(rows: list[tuple[float, int]], level: float) -> None:
    probs, targets = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    thresholds = class_thresholds(probs, targets, 4, level)
    assert thresholds == [coverage_threshold(probs[targets == label], level) for label in range(4)]


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=200), st.sampled_from((0.5, 0.8, 0.9, 0.95)))
def test_an_operating_point_is_what_it_says_and_is_evidence(rows: list[tuple[int, bool]], precision: float) -> None:
    confidence, right = np.array([row[0] / 20 for row in rows]), np.array([row[1] for row in rows])
    point = operating_point(confidence, right, precision)
    if point is None:
        return
    answered = confidence >= point.threshold
    assert (point.n_answered, point.n_right) == (answered.sum(), right[answered].sum())
    wrong = point.n_answered - point.n_right
    tail = sum(
        math.comb(point.n_answered, k) * (1 - precision) ** k * precision ** (point.n_answered - k) for k in range(wrong + 1)
    )
    assert tail <= RISK + 1e-9


def test_the_precision_asked_is_missed_about_as_rarely_as_promised() -> None:
    """A model whose surest answers are right with 99 % and whose least sure are right with 70 %, many times over."""
    rng = np.random.default_rng(0)
    missed, found, rounds = 0, 0, 400
    for _ in range(rounds):
        confidence = rng.random(300)
        right = rng.random(300) < 0.7 + 0.29 * confidence
        point = operating_point(confidence, right, 0.9)
        if point is not None:
            found += 1
            missed += 0.7 + 0.29 * (1 + point.threshold) / 2 < 0.9  # true precision of all answers above the threshold
    assert found > rounds / 2
    assert missed / rounds < 0.14  # 0.1, and three standard errors of 400 rounds


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(20, 80), st.integers(2, 40))
def test_distances_ignore_length_and_see_what_is_elsewhere(seed: int, n: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    known = (rng.random((n, width)) + 0.1).astype(np.float32)
    subspace = fit_subspace(known)
    distances = subspace.distances(known)
    assert (distances >= 0).all()
    np.testing.assert_allclose(subspace.distances(known * 7.5), distances, atol=1e-5)
    assert float(subspace.distances(-known[:1])[0]) > float(distances.max())  # the opposite direction
    np.testing.assert_allclose(subspace.components @ subspace.components.T, np.eye(len(subspace.components)), atol=1e-4)


def test_embeddings_that_are_all_the_same_or_all_zero_make_no_trouble() -> None:
    for known in (np.zeros((40, 6), np.float32), np.ones((40, 6), np.float32)):
        assert np.isfinite(held_out_distances(known)).all()
        assert fit_subspace(known).components.shape == (0, 6)


def test_a_held_out_distance_is_of_a_subspace_that_the_image_did_not_shape() -> None:
    known = np.random.default_rng(0).random((60, 200)).astype(np.float32)
    assert held_out_distances(known).mean() > 1.2 * fit_subspace(known).distances(known).mean()
