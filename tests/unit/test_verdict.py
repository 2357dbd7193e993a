"""Which arm is chosen, and how that is said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_compare import arm

from finetune.evaluation.compare import Pair, compare_pairs
from finetune.evaluation.verdict import Standing, decide_verdict
from finetune.metrics.accuracy import TOP1


def standing(name: str, value: float, seconds: float, **cost: float) -> Standing:
    return Standing(name, value, {"train_seconds": seconds, "latency_seconds": 0.01, **cost})


def pair(a: str, b: str, difference: float, p: float, *, error: float = 0.01) -> Pair:
    """A pair whose interval is as wide as `error` says."""
    targets = np.zeros(1000, np.int64)
    right = np.ones(1000, bool)
    (found,) = compare_pairs([arm(a, right, targets=targets), arm(b, right, targets=targets)])
    low, high = difference - 1.96 * error, difference + 1.96 * error
    headline = replace(found.headline, difference=difference, low=low, high=high, standard_error=error, degrees_of_freedom=998)
    return replace(found, headline=headline, p_value=p, p_adjusted=p, smallest_detectable=2.8 * error)


def test_the_arm_that_beats_all_others_is_chosen_and_its_price_is_said() -> None:
    standings = [standing("linear_probe", 0.903, 36), standing("full", 0.946, 1206)]
    verdict = decide_verdict(standings, [pair("linear_probe", "full", -0.043, 0.0004)], TOP1)
    assert (verdict.choose, verdict.outcome) == ("full", "better")
    assert verdict.sentence == (
        "full is better than linear_probe: by 4.3 points of top-1 accuracy over linear_probe (95 % interval 2.3 points to "
        "6.3 points, p = 0.0004 on 1,000 images), at 34 times its training time."
    )
    assert verdict.pareto == ("linear_probe", "full")


def test_of_equivalent_arms_the_cheapest_is_chosen() -> None:
    standings = [standing("linear_probe", 0.903, 36), standing("partial", 0.904, 142)]
    verdict = decide_verdict(standings, [pair("linear_probe", "partial", -0.001, 0.7, error=0.003)], TOP1)
    assert (verdict.choose, verdict.outcome) == ("linear_probe", "equivalent")
    assert "linear_probe and partial differ by at most 1.0 point of top-1 accuracy on 1,000 images" in verdict.sentence
    assert "partial takes 4 times its training time" in verdict.sentence


def test_what_cannot_be_told_apart_is_not_called_equal() -> None:
    standings = [standing("linear_probe", 0.90, 36), standing("partial", 0.91, 142)]
    verdict = decide_verdict(standings, [pair("linear_probe", "partial", -0.01, 0.5, error=0.015)], TOP1)
    assert (verdict.choose, verdict.outcome) == ("linear_probe", "undecided")
    assert "1,000 images are too few to decide between linear_probe and partial" in verdict.sentence
    assert "About 17,640 test images would show" in verdict.sentence


def test_an_arm_that_is_probably_better_is_proposed() -> None:
    standings = [standing("linear_probe", 0.60, 1), standing("full", 0.90, 60)]
    verdict = decide_verdict(standings, [pair("linear_probe", "full", -0.3, 0.06, error=0.15)], TOP1)
    assert (verdict.choose, verdict.outcome) == ("full", "undecided")
    assert "full is probably the best" in verdict.sentence


def test_more_seeds_are_advised_if_the_runs_of_an_arm_differ_most_by_seed() -> None:
    found = pair("linear_probe", "full", -0.02, 0.4, error=0.03)
    found = replace(found, headline=replace(found.headline, seed_share=0.9))
    verdict = decide_verdict([standing("linear_probe", 0.9, 1), standing("full", 0.92, 60)], [found], TOP1)
    assert "more seeds would help" in verdict.sentence


def test_a_beaten_arm_is_out_and_the_rest_is_judged_among_itself() -> None:
    standings = [standing("linear_probe", 0.80, 36), standing("partial", 0.944, 142), standing("full", 0.946, 1206)]
    pairs = [
        pair("linear_probe", "partial", -0.144, 1e-6),
        pair("linear_probe", "full", -0.146, 1e-6),
        pair("partial", "full", -0.002, 0.6, error=0.003),
    ]
    verdict = decide_verdict(standings, pairs, TOP1)
    assert (verdict.choose, verdict.outcome) == ("partial", "equivalent")
    assert "linear_probe" not in verdict.sentence.partition("differ by")[0]


@pytest.mark.parametrize("latency", [0.005, 0.02])
def test_an_arm_that_is_worse_in_everything_is_not_on_the_front(latency: float) -> None:
    standings = [standing("a", 0.90, 10), Standing("b", 0.89, {"train_seconds": 20, "latency_seconds": latency})]
    verdict = decide_verdict(standings, [pair("a", "b", 0.01, 0.5, error=0.015)], TOP1)
    assert verdict.pareto == (("a", "b") if latency < 0.01 else ("a",))


def test_latencies_that_differ_by_less_than_clocks_can_tell_leave_nobody_on_the_front() -> None:
    standings = [
        Standing("a", 0.90, {"train_seconds": 10, "latency_seconds": 0.0103}),
        Standing("b", 0.89, {"train_seconds": 20, "latency_seconds": 0.0100}),
    ]
    assert decide_verdict(standings, [pair("a", "b", 0.01, 0.5, error=0.015)], TOP1).pareto == ("a",)


def test_arms_between_which_no_difference_was_seen_are_not_ranked() -> None:
    standings = [standing("linear_probe", 0.933, 10), standing("partial", 0.933, 20)]
    verdict = decide_verdict(standings, [pair("linear_probe", "partial", 0.0, 1.0, error=0.15)], TOP1)
    assert (verdict.choose, verdict.outcome) == ("linear_probe", "undecided")
    assert "no difference in top-1 accuracy was found" in verdict.sentence
    assert "ahead" not in verdict.sentence
    assert "probably" not in verdict.sentence


def test_who_leads_by_chance_is_not_called_probably_the_best() -> None:
    standings = [standing("linear_probe", 0.95, 10), standing("partial", 0.93, 20)]
    verdict = decide_verdict(standings, [pair("linear_probe", "partial", 0.02, 0.78, error=0.05)], TOP1)
    assert (verdict.choose, verdict.outcome) == ("linear_probe", "undecided")
    assert "linear_probe and partial: linear_probe is ahead by 2.0 points of top-1 accuracy" in verdict.sentence
