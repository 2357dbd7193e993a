"""Measure the learning curve of a dataset with solved heads on subsets of it, and predict the gain from more labels.

The features of the frozen backbone are computed once or read from the cache, and each point of the curve is a solved head, so no
steps are taken. Every repetition holds out another random fifth of the images; the training images of a size are a stratified
subset of those of the next size. Images of one group, and files with the same bytes, are held out together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Dataset, Sample, targets_of
from finetune.errors import InvalidInput
from finetune.features.heads import head_solver
from finetune.features.rows import FeatureContext, Views, pooled_features
from finetune.messages import natural_list, plural
from finetune.metrics.imbalance import are_unequal
from finetune.progress import Progress, ProgressCallback, silent
from finetune.report.labels_page import render_labels
from finetune.runs.prepare import framing, read_and_build, split_for
from finetune.runs.resolve import resolve_task
from finetune.runs.shared import Shared
from finetune.spec import JobSpec
from finetune.storage.files import write_atomic
from finetune.studies.labels.curve import Estimate, LearningCurve, nested, training_sizes
from finetune.tasks import Task, task_named, task_of
from finetune.tasks.balance import ClassWeights

HELD_OUT = 0.2
REPEATS, SIZES = 8, 6
FARTHEST = 4.0  # largest number of training images that is predicted, relative to the present number
FOLDS = 3  # that choose the strength of the L2 penalty, once for each size
CURVE_POINTS = 40  # of the drawn curve
MATTERS = 0.005  # of the metric: the smallest gain that is worth more labels
_PLAIN_WORDS = {"top1": "accuracy", "mean_per_class_accuracy": "accuracy, mean over classes"}  # instead of the metric's label
Benefit = Literal["helps", "hardly helps", "cannot tell"]


@dataclass(frozen=True)
class Projection:
    """The predicted metric and its gain with more images.

    Args:
        more: additional images: per class, or, if images may have several labels, in all.
    """

    more: int
    n_train: int
    gain: Estimate
    value: Estimate
    per_class: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the projection as JSON values."""
        spelled = {
            name: {"value": one.value, "low": one.low, "high": one.high}
            for name, one in (("gain", self.gain), ("value", self.value))
        }
        return {"more_per_class" if self.per_class else "more_images": self.more, "n_train": self.n_train, **spelled}


@dataclass(frozen=True)
class LabelsStudy:
    """The result of a labels study.

    Args:
        task: the name of the task.
        metric: that the verdict uses, the key of one of the task's `learning_curve`: the first, or if the classes are of very
            unequal size the last, a mean over classes.
        curves: the learning curve of each metric.
        projections: of `metric`, for increasing numbers of images.
    """

    dataset: str
    revision: str
    backbone: str
    n_images: int
    counts: Mapping[str, int]
    task: str
    metric: str
    curves: Mapping[str, LearningCurve]
    projections: tuple[Projection, ...]
    too_far: tuple[int, ...] = ()  # requested numbers of additional images that are beyond `FARTHEST`
    page: Path | None = field(default=None, compare=False)

    @property
    def curve(self) -> LearningCurve:
        return self.curves[self.metric]

    @property
    def metric_label(self) -> str:
        return self.label_of(self.metric)

    def label_of(self, metric: str) -> str:
        """Return the name of a metric for display, given its key."""
        labels = {one.key: one.label for one in task_named(self.task).metrics} | _PLAIN_WORDS
        return labels[metric]

    @property
    def per_class(self) -> bool:
        """Whether additional images are counted per class; otherwise images may have several labels, and are counted in all."""
        return task_named(self.task).needs_every_class

    @property
    def more_label(self) -> str:
        """The heading of the numbers of additional images."""
        return "more images per class" if self.per_class else "more images"

    @property
    def verdict(self) -> Benefit:
        """Whether the gain from the largest projected number of images is at least `MATTERS`, is less, or is too uncertain."""
        gain = self.projections[-1].gain
        if not self.curve.fits:
            return "cannot tell"
        return "helps" if gain.low >= MATTERS else "hardly helps" if gain.high < MATTERS else "cannot tell"

    @property
    def sentence(self) -> str:
        """One sentence with the main result of the study."""
        last = self.projections[-1]
        gain = f"{points(last.gain.value)} points, {points_range(last.gain)}"
        more = f"{last.more:,} {self.more_label}"
        if not self.curve.fits:
            return f"The gain from {more} cannot be estimated: the measured values do not follow a learning curve."
        return {
            "helps": f"{more} would help: {gain}.",
            "hardly helps": f"{more} would hardly help: {gain}.",
            "cannot tell": f"It is uncertain whether {more} would gain {100 * MATTERS:g} points or more: {gain}.",
        }[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """Return the study as JSON values."""
        return {
            "dataset": self.dataset,
            "revision": self.revision,
            "backbone": self.backbone,
            "n_images": self.n_images,
            "classes": dict(self.counts),
            "metric": self.metric,
            "verdict": self.verdict,
            "sentence": self.sentence,
            "fits": self.curve.fits,
            "curves": {
                name: {
                    "n_train": list(curve.sizes),
                    "value": [round(float(1 - one), 6) for one in curve.mean],
                    "standard_error": [round(float(one), 6) for one in curve.standard_errors],
                    "repetitions": [[round(float(1 - one), 6) for one in row] for row in curve.errors],
                }
                for name, curve in self.curves.items()
            },
            "projections": [one.to_dict() for one in self.projections],
            "too_far": list(self.too_far),
            "page": None if self.page is None else str(self.page),
        }


def points(value: float) -> str:
    """Return a difference of two shares as text, in percentage points with a sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def points_range(one: Estimate) -> str:
    """Return the interval of a difference as text, in percentage points."""
    return f"{100 * one.low:.1f} to {100 * one.high:.1f}".replace("-", "−")


def study_labels(
    spec: JobSpec,
    shared: Shared,
    progress: ProgressCallback = silent,
    *,
    more: Sequence[int] = (),
    repeats: int = REPEATS,
    sizes: int = SIZES,
) -> LabelsStudy:
    """Measure the learning curve of a request's data, and predict the gain from more labels.

    Args:
        more: additional images to predict the gain for, per class, or in all if images may have several labels; by default a
            quarter, a half and all of the present number of training images.
        repeats: number of repetitions with other held-out images.
        sizes: number of training set sizes.

    Raises:
        InvalidInput: there are too few images, or an argument is too small.
    """
    if repeats < 2 or sizes < 4:
        raise InvalidInput(f"a learning curve needs at least 2 repetitions and 4 sizes, given {repeats} and {sizes}")
    if any(one < 1 for one in more):
        raise InvalidInput(f"more images: must be at least 1, given {natural_list(more)}")
    if spec.data.weight_column is not None:
        raise InvalidInput("data.weight_column: the labels study counts every image once; leave it out")
    dataset, network = read_and_build(spec, shared, progress)
    task = resolve_task(spec, dataset)
    preprocess = framing(spec, split_for(spec, dataset, None), network.facts.preprocess)
    features = pooled_features(
        network.prefix, dataset.samples, Views(preprocess), FeatureContext(shared.store, progress=progress)
    )
    weighting = Weighting(task, spec.data.class_weights, spec.data.logit_adjustment)
    curves = measured(features, dataset.samples, len(dataset.classes), spec.seed, repeats, sizes, progress, weighting)
    if curves is None:
        what = task.noun
        raise InvalidInput(
            f"{dataset.name}: {plural(len(dataset.samples), 'image')} of {plural(len(dataset.classes), what)} are too few for "
            f"a learning curve, which needs at least {10 * len(dataset.classes) + 1} images, two of each {what}. Add images"
        )
    return _conclude(dataset, task, network.prefix.backbone, curves, tuple(sorted(set(more))))


@dataclass(frozen=True)
class Weighting:
    """The task of the heads, and how they compensate unequal class sizes; see `finetune.tasks.balance`."""

    task: Task
    class_weights: ClassWeights = "none"
    logit_adjustment: float = 0.0


def measured(
    features: NDArray[np.float32],
    samples: Sequence[Sample],
    n_classes: int,
    seed: int,
    repeats: int = REPEATS,
    sizes: int = SIZES,
    progress: ProgressCallback = silent,
    weighting: Weighting | None = None,
) -> dict[str, LearningCurve] | None:
    """Return the learning curve of each metric; None if there are too few images.

    Args:
        features: (N, D), one row for each sample.
        weighting: by default the task that the labels ask for, and no weights.
    """
    weighting = weighting or Weighting(task_of(targets_of(samples)))
    targets = weighting.task.encode(targets_of(samples), n_classes)
    strata = weighting.task.strata(targets)  # (N,)
    units = _units(samples, strata)
    heads = _Heads(features, targets, n_classes, weighting, seed)
    errors: dict[str, list[list[float]]] = {}
    asked: tuple[int, ...] = ()
    for number in range(repeats):
        rng = np.random.default_rng([seed, number])
        train, held_out = _hold_out(units, rng)
        if not asked:
            asked = training_sizes(len(train), n_classes, sizes)
            if not asked or not len(held_out) or not heads.all_classes_in(train):
                return None
        rows: list[dict[str, float]] = []
        # A fifth of the groups is held out, so the number of training images differs a little between repetitions.
        for place, chosen in enumerate(nested(strata[train], [min(one, len(train)) for one in asked], rng)):
            rows.append(heads.errors(train[chosen], held_out, place))
            done = number * len(asked) + place + 1
            progress(Progress("training", done, repeats * len(asked), "heads", message="solving heads"))
        for name in rows[0]:
            errors.setdefault(name, []).append([row[name] for row in rows])
    share = HELD_OUT / (1 - HELD_OUT)
    return {name: LearningCurve(asked, np.array(values), share) for name, values in errors.items()}


@dataclass
class _Heads:
    """Solves heads on subsets of images, and evaluates them on others.

    Args:
        targets: as the task encodes them.
        strength: the L2 penalty for each size, by the size's position; chosen by the first head of each size.
    """

    features: NDArray[np.float32]
    targets: NDArray[Any]
    n_classes: int
    weighting: Weighting
    seed: int
    strength: dict[int, float] = field(default_factory=dict)

    def all_classes_in(self, rows: NDArray[np.int64]) -> bool:
        """Return whether each class has one of these images, if the task needs that."""
        return not self.weighting.task.needs_every_class or len(np.unique(self.targets[rows])) == self.n_classes

    def errors(self, rows: NDArray[np.int64], held_out: NDArray[np.int64], place: int) -> dict[str, float]:
        """Return 1 minus each metric on `held_out` of a head that is solved on `rows`, for the size at position `place`."""
        task = self.weighting.task
        balance = task.balance(self.targets[rows], self.n_classes, self.weighting.class_weights, self.weighting.logit_adjustment)
        head = head_solver(task.name)(
            self.features[rows],
            self.targets[rows],
            self.n_classes,
            val_features=None,
            val_targets=None,
            l2=self.strength.get(place),
            label_smoothing=0.0,
            seed=self.seed,
            class_weights=balance.weights,
        )
        self.strength.setdefault(place, head.l2)
        logits = head.logits(self.features[held_out])
        if balance.offsets is not None:
            logits = (logits - balance.offsets).astype(np.float32)
        figures = task.learning_curve(task.image_results(logits, self.targets[held_out]))
        return {key: 1 - value for key, value in figures.items()}


def _units(samples: Sequence[Sample], labels: NDArray[np.int64]) -> list[list[NDArray[np.int64]]]:
    """Return for each class the positions of images that are held out together: a group, or files with the same bytes.

    Args:
        labels: (N,) the class by which each image is drawn (`Task.strata`).
    """
    found: dict[str, list[int]] = defaultdict(list)
    for position, sample in enumerate(samples):
        found[sample.sha256 if sample.group is None else f"group {sample.group}"].append(position)
    by_class: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
    for positions in found.values():
        by_class[int(labels[positions[0]])].append(np.array(positions))
    return [by_class[label] for label in sorted(by_class)]


def _hold_out(
    units: Sequence[Sequence[NDArray[np.int64]]], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hold out a fifth of each class's units at random; return the positions to train on and the positions held out."""
    train, held_out = [], []
    for of_class in units:
        order = rng.permutation(len(of_class))
        n_held = min(max(round(HELD_OUT * len(of_class)), 1), len(of_class) - 1)
        held_out += [of_class[one] for one in order[:n_held]]
        train += [of_class[one] for one in order[n_held:]]
    return np.concatenate(train), np.concatenate(held_out) if held_out else np.empty(0, np.int64)


def _conclude(
    dataset: Dataset, task: Task, backbone: str, curves: Mapping[str, LearningCurve], more: tuple[int, ...]
) -> LabelsStudy:
    """Choose the metric, predict the gains, and return the study.

    Raises:
        InvalidInput: all requested numbers of images are beyond `FARTHEST`.
    """
    counts = {name: sum(of[name] for of in dataset.counts().values()) for name in dataset.classes}
    metric = list(curves)[-1 if are_unequal(counts.values()) else 0]
    per_class = task.needs_every_class
    curve, times = curves[metric], len(dataset.classes) if per_class else 1
    start = curve.sizes[-1]
    asked = more or tuple(sorted({_rounded(share * start / times) for share in (0.25, 0.5, 1.0)}))
    near = [one for one in asked if start + one * times <= FARTHEST * start]
    too_far = tuple(one for one in asked if one not in near)
    if not near:
        farthest = int((FARTHEST - 1) * start / times)
        raise InvalidInput(
            f"{asked[0]:,} more images{' per class' if per_class else ''} are more than can be predicted from {start:,} training "
            f"images; ask for at most {farthest:,}"
        )
    projections = []
    for one in near:
        end = start + one * times
        error = curve.error(end)
        value = Estimate(1 - error.value, 1 - error.high, 1 - error.low)
        projections.append(Projection(one, end, curve.gain(start, end), value, per_class))
    revision = dataset.revision or dataset.digest
    return LabelsStudy(
        dataset.name, revision, backbone, len(dataset.samples), counts, task.name, metric, curves, tuple(projections), too_far
    )


def _rounded(value: float) -> int:
    """Return the value rounded to two significant digits, at least 1."""
    whole = max(round(value), 1)
    step = 10 ** max(len(str(whole)) - 2, 0)
    return int(round(whole / step) * step)


def write_page(path: Path, found: LabelsStudy, command: str) -> LabelsStudy:
    """Write the page; return the study with its path.

    Args:
        command: that the page shows for repeating the study.
    """
    found = replace(found, page=path)
    labels = [found.label_of(name) for name in found.curves]
    html = render_labels(
        found.to_dict(), _predicted_curve(found), found.metric_label, rows_of(found), command, found.more_label, labels
    )
    write_atomic(path, lambda stream: stream.write(html.encode("utf-8", "replace")))
    return found


def rows_of(found: LabelsStudy) -> list[list[str]]:
    """Return the projections as rows of a table: more images, training images, gain, its interval, the metric then."""
    return [
        [f"+{one.more:,}", f"{one.n_train:,}", points(one.gain.value), points_range(one.gain), f"{one.value.value:.1%}"]
        for one in found.projections
    ]


def _predicted_curve(found: LabelsStudy) -> list[dict[str, float]]:
    """Return the predicted curve with its interval, from the smallest size to the largest projection, for drawing."""
    curve = found.curve
    sizes = np.geomspace(curve.sizes[0], found.projections[-1].n_train, CURVE_POINTS)
    curve_points = []
    for size in sorted({*sizes.round(), float(curve.sizes[-1])}):
        error = curve.error(int(size))
        curve_points.append({"n_train": float(size), "value": 1 - error.value, "low": 1 - error.high, "high": 1 - error.low})
    return curve_points
