"""How pixels should be given to pretrained weights: the frozen features of a few training images under several normalisations.

Weights do not say how they were trained: with which mean and deviation, in which order the channels come, whether pixels are 0 to
1 or 0 to 255. Where that is wrong the network still works, only worse. What tells is how well its features separate the user's
classes: for each normalisation a ridge head is fitted, and every image is answered by the head that was fitted without it, which
a closed form gives for nothing (Allen 1974, PRESS). Where the network has batch normalisation, its remembered statistics tell
more: `finetune.features.batch_statistics`. The images are the same, so differences are paired.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.bundle.preprocess import Preprocess
from finetune.data.dataset import Sample, targets_of
from finetune.features.batch_statistics import divergences
from finetune.model.classifier import Classifier
from finetune.runs.prepare import Prepared
from finetune.tasks import Task

FIRST_IMAGES = 96  # a normalisation that is worse on these is not tried on all
STATISTICS_IMAGES = 160
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


def compare_normalisations(network: Classifier, prepared: Prepared, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return what speaks for each other normalisation of pixels, against the present one.

    Returns:
        ``own`` and, for each of ``others``, its ``name``; ``statistics``, null where the network has no batch normalisation; and
        ``left_out``, null where the statistics speak against it, so that nothing was fitted.
    """
    preprocess = prepared.resolved.preprocess
    pixels = np.stack([sample.decode(preprocess.load) for sample in samples])  # (N, h, w, 3) uint8
    labels = _Labels(prepared.task, prepared.task.encode(targets_of(samples), len(prepared.dataset.classes)))
    classifier = copy.deepcopy(network).eval()
    own = _own(preprocess)
    remembered = _divergences(classifier, own, pixels[:STATISTICS_IMAGES])
    others = [(other, _nearer(remembered, _divergences(classifier, other, pixels[:STATISTICS_IMAGES]))) for other in _others(own)]
    tried = [other for other, statistics in others if statistics is None or statistics["gain"] > 0]
    left_out = _compare_left_out(classifier, own, tried, pixels, labels)
    return {
        "own": {"name": own.name, "n": len(samples)},
        "others": [
            {"name": other.name, "statistics": statistics, "left_out": left_out.get(other.name)} for other, statistics in others
        ],
    }


def _compare_left_out(
    classifier: Classifier, own: Normalisation, others: Sequence[Normalisation], pixels: NDArray[np.uint8], labels: _Labels
) -> dict[str, dict[str, float]]:
    """Return by name how well images are answered by heads that were fitted without them."""
    if not others:
        return {}
    of_own = _LeftOut.of(_features(classifier, own, pixels), labels)
    found = {}
    for other in others:
        n = min(FIRST_IMAGES, len(pixels))
        features = _features(classifier, other, pixels[:n])
        first = _LeftOut.of(features, labels.first(n))
        reference = _LeftOut.of(of_own.features[:n], labels.first(n))
        if first.better_than(reference) > 0 and n < len(pixels):
            features = np.concatenate([features, _features(classifier, other, pixels[n:])])
            first, reference = _LeftOut.of(features, labels), of_own
        found[other.name] = {
            "n": len(first.scores),
            "top1": float(first.scores.mean()),
            "own_top1": float(reference.scores.mean()),
            "z": first.better_than(reference),
        }
    return found


@dataclass(frozen=True)
class _Labels:
    """What images show, as a ridge head is fitted to it and as its answers are judged."""

    task: Task
    targets: NDArray[Any]  # encoded by the task

    @cached_property
    def indicators(self) -> Features:
        """(N, C) 1 where an image has the label"""
        if self.targets.ndim > 1:
            return np.asarray(self.targets, dtype=np.float64)
        one_hot: Features = np.eye(int(self.targets.max()) + 1)[self.targets]
        return one_hot

    def first(self, n: int) -> _Labels:
        return _Labels(self.task, self.targets[:n])

    def judge(self, answers: Features) -> NDArray[np.float64]:
        # A head fitted to 0 and 1 gives a label from one half on.
        return self.task.judge(answers.astype(np.float32), self.targets, np.full(answers.shape[1], 0.5)).score


@dataclass(frozen=True)
class _LeftOut:
    """The answers of ridge heads, each to the one image that it was fitted without."""

    features: Features  # (N, D)
    squared_errors: NDArray[np.float64]  # (N,) summed over the classes
    scores: NDArray[np.float64]  # (N,) how well each image is answered, 0 to 1

    @classmethod
    def of(cls, features: Features, labels: _Labels) -> _LeftOut:
        """Fit with the strength that answers left-out images best."""
        spread = features.std(axis=0)
        rows = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
        kernel = rows @ rows.T / max(rows.shape[1], 1) + 1.0  # the constant stands for the bias
        values, vectors = np.linalg.eigh(kernel)
        best: _LeftOut | None = None
        for strength in STRENGTHS:
            inverse = (vectors / (values.clip(min=0) + strength)) @ vectors.T
            residuals = (inverse @ labels.indicators) / np.diagonal(inverse)[:, None]  # (N, C), of the left-out image
            found = cls(features, (residuals**2).sum(axis=1), labels.judge(labels.indicators - residuals))
            if best is None or found.squared_errors.mean() < best.squared_errors.mean():
                best = found
        assert best is not None
        return best

    def better_than(self, other: _LeftOut) -> float:
        """Return by how many standard errors the squared errors are smaller than another's on the same images."""
        gains = other.squared_errors - self.squared_errors
        error = float(gains.std(ddof=1)) / np.sqrt(len(gains))
        return float(gains.mean() / error) if error > 0 else 0.0


def _divergences(classifier: Classifier, given: Normalisation, pixels: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    ordered = np.ascontiguousarray(pixels[..., ::-1]) if given.blue_first else pixels
    with _normalising(classifier, given):
        return divergences(classifier, ordered)


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


def _own(preprocess: Preprocess) -> Normalisation:
    own = Normalisation("", preprocess.mean, preprocess.std)
    known = next((one.name for one in CANDIDATES if one.same_as(own)), None)
    numbers = "mean " + ", ".join(f"{value:.3g}" for value in own.mean) + ", deviation " + ", ".join(f"{v:.3g}" for v in own.std)
    return Normalisation(known or f"RGB with {numbers}", own.mean, own.std)


def _others(own: Normalisation) -> list[Normalisation]:
    swapped = Normalisation(f"{own.name.replace('RGB', 'BGR', 1)}", own.mean, own.std, blue_first=True)
    return [swapped, *(one for one in CANDIDATES if not one.same_as(own))]


@torch.no_grad()
def _features(classifier: Classifier, given: Normalisation, pixels: NDArray[np.uint8]) -> Features:
    """Return the embeddings (N, D) of pixels that are normalised as `given`."""
    ordered = np.ascontiguousarray(pixels[..., ::-1]) if given.blue_first else pixels
    with _normalising(classifier, given):
        batches = [ordered[start : start + BATCH_SIZE] for start in range(0, len(ordered), BATCH_SIZE)]
        rows = [classifier.embed(classifier.normalise(torch.from_numpy(batch))).numpy() for batch in batches]
    return np.concatenate(rows).astype(np.float64)


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
