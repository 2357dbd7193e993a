"""Compare a model's predictions in production with its reference, and summarise in a sentence whether they have drifted.

Drift is reported if a test is significant after adjustment for all tests of the window (Holm, `ALPHA`) and its effect reaches a
threshold. The tests and their sources are in `finetune.metrics.drift`; ``docs/monitoring.md`` has their measured error rates.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from finetune.messages import plural
from finetune.metrics.drift import holm, homogeneity_test, ks_test, labels_test, population_stability_index
from finetune.monitoring.reference import MIN_IMAGES, Reference
from finetune.monitoring.statistics import PredictionStatistics
from finetune.monitoring.window import WINDOW_IMAGES, Window

MIN_WINDOW = 200
"""Least number of images in production for a test; fewer could not show a relevant difference."""
ALPHA = 0.001
"""The significance level: the probability of a false alarm in one window. Low, because there are many windows."""
KS_THRESHOLD = 0.1
PSI_THRESHOLD = 0.2
SHARE_THRESHOLD = 0.1

DriftState = Literal["no_reference", "collecting", "steady", "drifted"]
EffectMeasure = Literal["ks_distance", "population_stability_index", "share_difference"]

_WHAT = {
    "confidence": "the probability of the most probable class",
    "classes": "which classes are predicted",
    "embedding": "how unlike known images the embeddings are",
    "labels": "how often each label is given",
    "labels_per_image": "how many labels an image is given",
}
_SAID = {
    "confidence": "how sure it is",
    "classes": "which classes it predicts",
    "embedding": "how unlike known images the pictures are",
    "labels": "which labels it gives",
    "labels_per_image": "how many labels it gives",
}


@dataclass(frozen=True)
class DriftTest:
    """One test of predictions in production against the reference."""

    name: str
    what: str
    test: str
    statistic: float
    p: float
    adjusted_p: float  # adjusted for the number of tests (Holm)
    effect: float
    effect_measure: EffectMeasure
    threshold: float  # least effect that is relevant
    drifted: bool


@dataclass(frozen=True)
class HourSummary:
    """Statistics of the predictions of one hour."""

    at: int
    n: int
    mean_confidence: float
    unlike_share: float | None


@dataclass(frozen=True)
class Drift:
    """The result of all tests: whether predictions in production differ from those for held-out images."""

    state: DriftState
    sentence: str
    n: int  # compared images in production
    n_needed: int
    n_seen: int  # all images in production
    window: int  # largest number of compared images
    reference_split: str | None
    reference_n: int
    alpha: float
    drifted_since: float | None  # Unix seconds
    tests: tuple[DriftTest, ...]
    hours: tuple[HourSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


def drift_of(reference: Reference | None, window: Window) -> Drift:
    """Test the predictions in a window against the reference."""
    tests: tuple[DriftTest, ...] = ()
    if reference is None:
        state: DriftState = "no_reference"
    elif len(window) < MIN_WINDOW:
        state = "collecting"
    else:
        tests = compare(reference, window.statistics())
        state = "drifted" if any(test.drifted for test in tests) else "steady"
    return Drift(
        state=state,
        sentence=_sentence(state, reference, window, tests),
        n=len(window),
        n_needed=MIN_WINDOW,
        n_seen=window.n_seen,
        window=WINDOW_IMAGES,
        reference_split=None if reference is None else reference.split,
        reference_n=0 if reference is None else len(reference),
        alpha=ALPHA,
        drifted_since=window.alarm.since if state == "drifted" else None,
        tests=tests,
        hours=tuple(
            HourSummary(one.at, one.n, one.confidence_sum / one.n, one.n_unlike / one.n if window.knows_unlike else None)
            for one in sorted(window.hours.values(), key=lambda hour: hour.at)
        ),
    )


def compare(reference: Reference, live: PredictionStatistics, alpha: float = ALPHA) -> tuple[DriftTest, ...]:
    """Run all tests of predictions in production against the reference; neither may be empty."""
    held_out = reference.statistics
    found = [("confidence", "Kolmogorov-Smirnov", *_ks(held_out.confidence, live.confidence, 3))]
    if held_out.given is not None and live.given is not None:
        found += _of_labels(held_out.given, live.given)
    else:
        found.append(("classes", "chi-square", *_of_classes(held_out.label, live.label)))
    known, distances = reference.distances, live.distance[np.isfinite(live.distance)]
    if known is not None and len(distances):
        found.append(("embedding", "Kolmogorov-Smirnov", *_ks(known, distances, 4)))
    adjusted = holm([p for _, _, _, p, *_ in found])
    return tuple(
        DriftTest(
            name, _WHAT[name], test, statistic, p, together, effect, measure, threshold,
            drifted=together <= alpha and effect >= threshold,
        )
        for (name, test, statistic, p, effect, measure, threshold), together in zip(found, adjusted, strict=True)
    )  # fmt: skip


_Found = tuple[float, float, float, EffectMeasure, float]  # statistic, p, effect, effect measure, threshold


def _ks(reference: Any, live: Any, decimals: int) -> _Found:
    """Compare values rounded to `decimals`, since results differ between processors in the last bits."""
    distance, p = ks_test(np.round(reference, decimals), np.round(live, decimals))
    return distance, p, distance, "ks_distance", KS_THRESHOLD


def _of_classes(reference: Any, live: Any) -> _Found:
    n_classes = 1 + int(max(reference.max(), live.max()))
    counts = [np.bincount(labels, minlength=n_classes) for labels in (reference, live)]
    statistic, p = homogeneity_test(*counts)
    return statistic, p, population_stability_index(*counts), "population_stability_index", PSI_THRESHOLD


def _of_labels(reference: Any, live: Any) -> list[tuple[str, str, float, float, float, EffectMeasure, float]]:
    difference, p = labels_test(reference.sum(axis=0), len(reference), live.sum(axis=0), len(live))
    return [
        ("labels", "Fisher's exact test of each label", difference, p, difference, "share_difference", SHARE_THRESHOLD),
        ("labels_per_image", "Kolmogorov-Smirnov", *_ks(reference.sum(axis=1), live.sum(axis=1), 0)),
    ]


def _sentence(state: DriftState, reference: Reference | None, window: Window, tests: tuple[DriftTest, ...]) -> str:
    if reference is None or state == "no_reference":
        return (
            f"Nothing to compare with: the bundle has no reference. A reference needs at least {MIN_IMAGES} test or "
            "val images; bundles of early versions of finetune have none. Train the model again with more images, or accept the "
            "present live answers as the reference"
        )
    if state == "collecting":
        return f"Not enough yet: {len(window)} of {MIN_WINDOW} images"
    compared = f"the last {plural(len(window), 'image')} and the {len(reference):,} {reference.split} images"
    if state == "steady":
        return f"No drift: no difference that matters between {compared}"
    said = [_SAID[test.name] for test in tests if test.drifted]
    listed = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
    return f"Drifted: {compared} differ in {listed}"
