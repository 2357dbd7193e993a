"""Conclude a comparison: which arm to choose, by fixed rules, with the reason in one sentence.

1. An arm is beaten if another arm is significantly better (p < 0.05, adjusted for the number of pairs).
2. If one arm beats every other, it is chosen: *better*.
3. Otherwise the arms that are not beaten are compared with the best of them. If all are equivalent to it (within the margin, by
   the equivalence test), the cheapest is chosen: *equivalent*.
4. Otherwise these images and runs do not suffice: *undecided*. Arms that are probably worse than the best (p < 0.2 in their pair)
   are excluded, and the cheapest of the others is proposed, with advice on whether more images or more seeds would decide.

Cost only decides between arms of equal or undecided quality: training time first, then latency, bundle size, trained parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune.evaluation.compare import Pair, images_needed
from finetune.metrics import Metric

COSTS = ("train_seconds", "latency_seconds", "bundle_bytes", "trainable_parameters")
"""The costs by which arms of equal quality are compared, most important first; less is better."""

PROBABLY = 0.2

TIMING_NOISE = 0.1
"""Times that differ by less than this share count as equal on the Pareto front: repeated measurements differ as much."""

Outcome = Literal["better", "equivalent", "undecided"]


@dataclass(frozen=True)
class Standing:
    """The quality and the costs of one arm."""

    name: str
    value: float  # of the headline metric, mean over runs
    cost: Mapping[str, float]  # those of `COSTS` that are known, mean over runs

    def cost_key(self) -> tuple[float, ...]:
        """Return a key that sorts the cheaper arm first."""
        return tuple(self.cost.get(name, float("inf")) for name in COSTS)


@dataclass(frozen=True)
class Verdict:
    """Which arm to choose, and why."""

    choose: str
    outcome: Outcome
    sentence: str
    pareto: tuple[str, ...]  # the Pareto front: arms that no other arm dominates in quality and costs


def decide_verdict(standings: Sequence[Standing], pairs: Sequence[Pair], metric: Metric[Any]) -> Verdict:
    """Choose among the arms by the rules in the module's docstring."""
    beaten = {pair.b if pair.winner == pair.a else pair.a for pair in pairs if pair.winner is not None}
    unbeaten = [arm for arm in standings if arm.name not in beaten] or list(standings)
    best = max(unbeaten, key=lambda arm: (arm.value, [-cost for cost in arm.cost_key()]))
    cheapest = min(unbeaten, key=Standing.cost_key)
    pareto = tuple(arm.name for arm in standings if not any(_dominates(other, arm) for other in standings))
    if len(unbeaten) == 1:
        return Verdict(best.name, "better", _better(best, standings, pairs, metric), pareto)
    of_best = [pair for pair in pairs if best.name in (pair.a, pair.b) and _other(pair, best.name) not in beaten]
    if all(pair.equivalent for pair in of_best):
        return Verdict(cheapest.name, "equivalent", _equivalent(cheapest, unbeaten, of_best, metric), pareto)
    worse = {_other(pair, best.name) for pair in of_best if _favours(pair, best.name) and pair.p_value < PROBABLY}
    proposed = min((arm for arm in unbeaten if arm.name not in worse), key=Standing.cost_key)
    return Verdict(proposed.name, "undecided", _undecided(proposed, best, unbeaten, of_best, metric), pareto)


def _favours(pair: Pair, name: str) -> bool:
    return (pair.headline.difference > 0) == (pair.a == name)


def _other(pair: Pair, name: str) -> str:
    return pair.b if pair.a == name else pair.a


def _dominates(one: Standing, other: Standing) -> bool:
    """Return whether `one` is at least as good as `other` in quality and every cost, and better in one of them."""
    shared = [name for name in COSTS if name in one.cost and name in other.cost]
    at_least = one.value >= other.value and not any(_cheaper(name, other, one) for name in shared)
    return at_least and (one.value > other.value or any(_cheaper(name, one, other) for name in shared))


def _cheaper(name: str, one: Standing, other: Standing) -> bool:
    noise = TIMING_NOISE if name.endswith("_seconds") else 0.0
    return one.cost[name] * (1 + noise) < other.cost[name]


def _better(best: Standing, standings: Sequence[Standing], pairs: Sequence[Pair], metric: Metric[Any]) -> str:
    others = [arm for arm in standings if arm.name != best.name]
    runner_up = max(others, key=lambda arm: arm.value)
    pair = next(pair for pair in pairs if {pair.a, pair.b} == {best.name, runner_up.name})
    sign = 1 if pair.a == best.name else -1
    low, high = sorted((sign * pair.headline.low, sign * pair.headline.high))
    gain = points_of(sign * pair.headline.difference, metric)
    price = _cost_ratio(best, runner_up)
    return (
        f"{best.name} is better than {natural(arm.name for arm in others)}: by {gain} over {runner_up.name} "
        f"(95 % interval {points(low, metric)} to {points(high, metric)}, p = {pair.p_adjusted:.2g} on {pair.n:,} images)"
        f"{f', at {price}' if price else ''}."
    )


def _equivalent(cheapest: Standing, unbeaten: Sequence[Standing], pairs: Sequence[Pair], metric: Metric[Any]) -> str:
    margin = points_of(pairs[0].margin, metric)
    others = [arm for arm in unbeaten if arm.name != cheapest.name]
    price = _cost_ratio(max(others, key=Standing.cost_key), cheapest)
    return (
        f"There is no difference that matters: {natural(arm.name for arm in unbeaten)} differ by at most {margin} on "
        f"{pairs[0].n:,} images, so take the cheapest, {cheapest.name}"
        f"{f' ({max(others, key=Standing.cost_key).name} takes {price})' if price else ''}."
    )


def _undecided(
    proposed: Standing, best: Standing, unbeaten: Sequence[Standing], pairs: Sequence[Pair], metric: Metric[Any]
) -> str:
    least_sure = max(pairs, key=lambda pair: pair.smallest_detectable)
    largest = max(pairs, key=lambda pair: abs(pair.headline.difference))
    lead = abs(largest.headline.difference)
    reliably = f"these images reliably show differences of {points(least_sure.smallest_detectable, metric)} or more"
    names = natural(arm.name for arm in unbeaten)
    if lead == 0:
        return (
            f"On these {least_sure.n:,} images no difference in {metric.label} was found between {names}; {reliably}. "
            f"Until there are more images, choose the cheapest, {proposed.name}."
        )
    if proposed.name == best.name and largest.p_value < PROBABLY:
        opening = f"{best.name} is probably the best of {names}, but that is not certain"
        closing = f"Until then, choose {best.name}."
    else:
        opening = f"{least_sure.n:,} images are too few to decide between {names}"
        closing = f"Until then, choose {proposed.name if proposed.name == best.name else f'the cheapest, {proposed.name}'}."
    found = f"{best.name} is ahead by {points_of(lead, metric)}; {reliably}"
    if least_sure.headline.seed_share > 0.5:
        advice = "The runs of an arm differ much from seed to seed, so more seeds would help."
    else:
        needed = images_needed(least_sure, max(lead, least_sure.margin))
        advice = f"About {needed:,} test images would show whether a difference of this size is real."
    return f"{opening}: {found}. {advice} {closing}"


def _cost_ratio(arm: Standing, other: Standing) -> str:
    """Return the ratio of the training times of two arms as text; empty if a time is unknown."""
    seconds = arm.cost.get("train_seconds"), other.cost.get("train_seconds")
    if seconds[0] is None or seconds[1] is None or seconds[1] <= 0:
        return ""
    ratio = seconds[0] / seconds[1]
    return f"{ratio:.0f} times its training time" if ratio >= 2 else f"{ratio:.1f} times its training time"


def points(difference: float, metric: Metric[Any]) -> str:
    """Return a difference as text, in percentage points if the metric is shown as a percentage."""
    if not metric.percent:
        return f"{difference:.3f}"
    value = 100 * difference
    return f"{value:.1f} point{'' if abs(round(value, 1)) == 1 else 's'}"


def points_of(difference: float, metric: Metric[Any]) -> str:
    """Return a difference as text with the name of the metric: ``4.3 points of top-1 accuracy``, ``0.012 in macro F1``."""
    return f"{points(difference, metric)} {'of' if metric.percent else 'in'} {metric.label}"


def natural(names: Iterable[str]) -> str:
    """Return ``a``, ``a and b`` or ``a, b and c``."""
    listed = list(names)
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
