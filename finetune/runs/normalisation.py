"""How pixels should be given to pretrained weights: the frozen features of a few training images under several normalisations.

Weights do not say how they were trained: with which mean and deviation, in which order the channels come, whether pixels are 0 to
1 or 0 to 255. Where that is wrong the network still works, only worse. What tells is how well its features separate the user's
classes: for each normalisation a ridge head is fitted, and every image is answered by the head that was fitted without it, which
a closed form gives for nothing (Allen 1974, PRESS). Where the network has batch normalisation, its remembered statistics tell
more: `finetune.features.batch_statistics`. The images are the same, so differences are paired.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.export import DeployModule
from finetune.export.graph import fill
from finetune.features.batch_statistics import divergences
from finetune.features.prefix import prefix_digest
from finetune.model.classifier import Classifier
from finetune.progress import ProgressCallback, silent
from finetune.runs.build import Built, Shared
from finetune.runs.options import RunOptions
from finetune.runs.prepare import prepare
from finetune.runtime.session import open_session
from finetune.spec import load_spec
from finetune.storage.files import read_json, write_json
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store
from finetune.train.sample import SHARE_OF_TRAINING, STEP_COST, choose_sample

FIRST_IMAGES, ALL_IMAGES = 96, 288  # a normalisation that is worse on the first is not tried on all
STATISTICS_IMAGES = 160
MEASUREMENT = 2  # raise it where what is measured changes
BATCH_SIZE = 16
SMALLEST_DIVERGENCE = 1e-3  # so that layers which agree anyway do not count
STRENGTHS = tuple(float(10.0**exponent) for exponent in np.arange(-4.0, 1.1, 0.5))  # of the ridge, relative to the mean kernel

Features = NDArray[np.float64]


@dataclass(frozen=True)
class Normalisation:
    """What is subtracted from pixels in 0..1 and what they are divided by, and the order of the channels."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    blue_first: bool = False

    def same_as(self, other: Normalisation) -> bool:
        """Return whether both compute the same, whatever they are called."""
        numbers = (*self.mean, *self.std), (*other.mean, *other.std)
        return self.blue_first == other.blue_first and bool(np.allclose(*numbers, rtol=1e-3))


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OF_BYTES = (1 / 255, 1 / 255, 1 / 255)
CANDIDATES = (
    Normalisation("RGB with ImageNet's mean and deviation", IMAGENET_MEAN, IMAGENET_STD),
    Normalisation("RGB from -1 to 1", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    Normalisation("RGB from 0 to 1", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    Normalisation("RGB from 0 to 255", (0.0, 0.0, 0.0), OF_BYTES),
    Normalisation("BGR from 0 to 255 less ImageNet's mean (Caffe)", (0.406, 0.456, 0.485), OF_BYTES, blue_first=True),
)


def check_normalisation(built: Built, run: RunDir, store: Store, *, at_any_cost: bool = False) -> None:
    """Measure, and write ``measurements/preprocessing.json``; what was measured of these weights and images before is taken over.

    Done where the weights come from a file, of which nobody knows how it was trained, and where it costs a hundredth of the
    training at most; with `at_any_cost` always. Weights that are drawn at random expect nothing.
    """
    if run.preprocessing.exists() or not built.resolved.backbone.is_pretrained:
        return
    known = store.folder("notes") / f"normalisation-{_digest(built)}.json"
    from_a_file = built.resolved.backbone.weights["source"] == "file"
    if known.exists():
        write_json(run.preprocessing, read_json(known))
    elif from_a_file or at_any_cost or _costs_little(built):
        measured = compare_normalisations(built)
        write_json(known, measured)
        write_json(run.preprocessing, measured)


def measure_finished_run(run: RunDir, shared: Shared, progress: ProgressCallback = silent) -> None:
    """Measure for a run whose folder exists, from its data and weights, which must be where they were.

    Raises:
        InvalidInput: the data or the weights are no longer there.
    """
    built = prepare(load_spec(run.spec), shared, progress, run, RunOptions.read(run))
    check_normalisation(built, run, shared.store, at_any_cost=True)


def compare_normalisations(built: Built) -> dict[str, Any]:
    """Return what speaks for each other normalisation of pixels, against the present one.

    Returns:
        ``own`` and, for each of ``others``, its ``name``; ``statistics``, null where the network has no batch normalisation; and
        ``left_out``, null where the statistics speak against it, so that nothing was fitted.
    """
    samples = _samples(built)
    pixels = np.stack([sample.decode(built.resolved.preprocess.load) for sample in samples])  # (N, h, w, 3) uint8
    targets = built.task.encode([sample.target for sample in samples], len(built.dataset.classes))
    one_hot = np.eye(len(built.dataset.classes))[targets]
    own = _own(built)
    remembered = _divergences(built, own, pixels[:STATISTICS_IMAGES])
    others = [(other, _nearer(remembered, _divergences(built, other, pixels[:STATISTICS_IMAGES]))) for other in _others(built)]
    tried = [other for other, statistics in others if statistics is None or statistics["gain"] > 0]
    left_out = _compare_left_out(built, own, tried, pixels, one_hot)
    return {
        "own": {"name": own.name, "n": len(samples)},
        "others": [
            {"name": other.name, "statistics": statistics, "left_out": left_out.get(other.name)} for other, statistics in others
        ],
    }


def _compare_left_out(
    built: Built, own: Normalisation, others: Sequence[Normalisation], pixels: NDArray[np.uint8], one_hot: Features
) -> dict[str, dict[str, float]]:
    """Return by name how well images are answered by heads that were fitted without them."""
    if not others:
        return {}
    of_own = _LeftOut.of(_features(built, own, pixels), one_hot)
    found = {}
    for other in others:
        n = min(FIRST_IMAGES, len(pixels))
        features = _features(built, other, pixels[:n])
        first = _LeftOut.of(features, one_hot[:n])
        reference = _LeftOut.of(of_own.features[:n], one_hot[:n])
        if first.better_than(reference) > 0 and n < len(pixels):
            features = np.concatenate([features, _features(built, other, pixels[n:])])
            first, reference = _LeftOut.of(features, one_hot), of_own
        found[other.name] = {
            "n": len(first.right),
            "top1": float(first.right.mean()),
            "own_top1": float(reference.right.mean()),
            "z": first.better_than(reference),
        }
    return found


@dataclass(frozen=True)
class _LeftOut:
    """The answers of ridge heads, each to the one image that it was fitted without."""

    features: Features  # (N, D)
    squared_errors: NDArray[np.float64]  # (N,) summed over the classes
    right: NDArray[np.bool_]  # (N,)

    @classmethod
    def of(cls, features: Features, one_hot: Features) -> _LeftOut:
        """Fit with the strength that answers left-out images best."""
        spread = features.std(axis=0)
        rows = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
        kernel = rows @ rows.T / max(rows.shape[1], 1) + 1.0  # the constant stands for the bias
        values, vectors = np.linalg.eigh(kernel)
        best: _LeftOut | None = None
        for strength in STRENGTHS:
            inverse = (vectors / (values.clip(min=0) + strength)) @ vectors.T
            residuals = (inverse @ one_hot) / np.diagonal(inverse)[:, None]  # (N, C), of the left-out image
            right = (one_hot - residuals).argmax(axis=1) == one_hot.argmax(axis=1)
            found = cls(features, (residuals**2).sum(axis=1), right)
            if best is None or found.squared_errors.mean() < best.squared_errors.mean():
                best = found
        assert best is not None
        return best

    def better_than(self, other: _LeftOut) -> float:
        """Return by how many standard errors the squared errors are smaller than another's on the same images."""
        gains = other.squared_errors - self.squared_errors
        error = float(gains.std(ddof=1)) / np.sqrt(len(gains))
        return float(gains.mean() / error) if error > 0 else 0.0


def _divergences(built: Built, given: Normalisation, pixels: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    ordered = np.ascontiguousarray(pixels[..., ::-1]) if given.blue_first else pixels
    with _normalising(built.classifier, given):
        return divergences(built.classifier, ordered)


def _nearer(own: NDArray[np.float64] | None, other: NDArray[np.float64] | None) -> dict[str, float] | None:
    """Return how much nearer the statistics of activations come to those that the weights remember, given another normalisation.

    Returns:
        gain: the mean over layers of the natural logarithm of the ratio of divergences; above 0: nearer.
        z: the gain in standard errors over groups of images.
    """
    if own is None or other is None:
        return None
    gains = np.log((own + SMALLEST_DIVERGENCE) / (other + SMALLEST_DIVERGENCE)).mean(axis=1)  # (groups,)
    error = float(gains.std(ddof=1)) / np.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return {"gain": float(gains.mean()), "z": float(gains.mean() / error) if error > 0 else 0.0}


def _own(built: Built) -> Normalisation:
    preprocess = built.resolved.preprocess
    own = Normalisation("", preprocess.mean, preprocess.std)
    known = next((one.name for one in CANDIDATES if one.same_as(own)), None)
    numbers = "mean " + ", ".join(f"{value:.3g}" for value in own.mean) + ", deviation " + ", ".join(f"{v:.3g}" for v in own.std)
    return Normalisation(known or f"RGB with {numbers}", own.mean, own.std)


def _others(built: Built) -> list[Normalisation]:
    own = _own(built)
    swapped = Normalisation(f"{own.name.replace('RGB', 'BGR', 1)}", own.mean, own.std, blue_first=True)
    return [swapped, *(one for one in CANDIDATES if not one.same_as(own))]


def _features(built: Built, given: Normalisation, pixels: NDArray[np.uint8]) -> Features:
    """Return the embeddings (N, D) of pixels that are normalised as `given`."""
    with _normalising(built.classifier, given):
        session = open_session(fill(built.graph, DeployModule(built.classifier, task=built.task.name)))
    ordered = np.ascontiguousarray(pixels[..., ::-1]) if given.blue_first else pixels
    batches = (ordered[start : start + BATCH_SIZE] for start in range(0, len(ordered), BATCH_SIZE))
    return np.concatenate([session.run(["embedding"], {"images": batch})[0] for batch in batches]).astype(np.float64)


@contextmanager
def _normalising(classifier: Classifier, given: Normalisation) -> Iterator[None]:
    """Inside the block the classifier normalises pixels as `given`."""
    own = classifier._scale.clone(), classifier._shift.clone()
    mean, std = torch.tensor(given.mean), torch.tensor(given.std)
    classifier._scale.copy_((1 / (255 * std)).view(1, 3, 1, 1))
    classifier._shift.copy_((-mean / std).view(1, 3, 1, 1))
    try:
        yield
    finally:
        classifier._scale.copy_(own[0])
        classifier._shift.copy_(own[1])


def _samples(built: Built) -> Sequence[Sample]:
    """Return a sample of the training images in an order that has nothing to do with their classes."""
    train = built.dataset.of("train")
    chosen = [train[index] for index in choose_sample(train, ALL_IMAGES)]
    return sorted(chosen, key=lambda sample: (sample.sha256, sample.id))


def _costs_little(built: Built) -> bool:
    recipe = built.resolved.recipe
    n_passes = FIRST_IMAGES * (len(CANDIDATES) + 1) + ALL_IMAGES
    return n_passes <= SHARE_OF_TRAINING * STEP_COST * recipe.n_steps * recipe.batch_size


def _digest(built: Built) -> str:
    """sha256 of all that the measurement depends on."""
    samples: Mapping[str, Any] = {sample.sha256: sample.target for sample in _samples(built)}
    parts = (
        MEASUREMENT,
        prefix_digest(built.classifier, len(built.classifier.backbone.stages)),
        built.resolved.preprocess.digest(),
        samples,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
