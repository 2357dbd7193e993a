"""Find out whether pretrained weights expect another pixel normalisation than the one in use, from a few training images.

A weights file does not say how it was trained: with which mean and standard deviation, in which channel order, on pixels from 0
to 1 or from 0 to 255. With the wrong normalisation the network still works, but worse. Two measurements compare the normalisation
in use with the common ones, on the same images (so the differences are paired):

- For each normalisation a ridge head is fitted on the frozen features, and every image is predicted by the head that was fitted
  without it. These leave-one-out predictions have a closed form (Allen 1974, PRESS), so they cost no further fits.
- If the network has batch normalisation, the statistics of its activations are compared with the running statistics in the
  weights, which is more sensitive (`finetune.features.batch_statistics`).
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

FIRST_IMAGES = 96  # a normalisation that is worse on these images is not tried on all of them
STATISTICS_IMAGES = 160
BATCH_SIZE = 16
SMALLEST_DIVERGENCE = 1e-3  # is added to every divergence, so that layers which agree with both normalisations hardly count
STRENGTHS = tuple(float(10.0**exponent) for exponent in np.arange(-4.0, 1.1, 0.5))  # ridge, for a kernel divided by D

Features = NDArray[np.float64]


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation for pixels from 0 to 1, and the order of the channels (RGB, or BGR if `blue_first`)."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    blue_first: bool = False

    def same_as(self, other: Normalisation) -> bool:
        """Return whether both normalise alike; their names do not count."""
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
    """Compare the present normalisation of pixels (``own``) with the other common ones (``others``).

    Returns:
        The content of ``measurements/preprocessing.json``. Each of ``others`` has its ``name``; ``statistics`` as
        `_statistics_gain` returns them, None without batch normalisation; and ``left_out`` as `_compare_leave_one_out` returns
        it, None if the statistics already show that it is worse, so that no head was fitted.
    """
    preprocess = prepared.resolved.preprocess
    pixels = np.stack([sample.decode(preprocess.load) for sample in samples])  # (N, h, w, 3) uint8
    labels = _Labels(prepared.task, prepared.task.encode(targets_of(samples), len(prepared.dataset.classes)))
    classifier = copy.deepcopy(network).eval()
    own = _own(preprocess)
    remembered = _divergences(classifier, own, pixels[:STATISTICS_IMAGES])
    others = [
        (other, _statistics_gain(remembered, _divergences(classifier, other, pixels[:STATISTICS_IMAGES])))
        for other in _others(own)
    ]
    tried = [other for other, statistics in others if statistics is None or statistics["gain"] > 0]
    left_out = _compare_leave_one_out(classifier, own, tried, pixels, labels)
    return {
        "own": {"name": own.name, "n": len(samples)},
        "others": [
            {"name": other.name, "statistics": statistics, "left_out": left_out.get(other.name)} for other, statistics in others
        ],
    }


def _compare_leave_one_out(
    classifier: Classifier, own: Normalisation, others: Sequence[Normalisation], pixels: NDArray[np.uint8], labels: _Labels
) -> dict[str, dict[str, float]]:
    """Compare leave-one-out predictions under each of `others` with those under the present normalisation.

    Returns:
        By name: the number of images ``n``, the accuracies ``top1`` and ``own_top1``, and the improvement ``z`` of the squared
            error in standard errors.
    """
    if not others:
        return {}
    of_own = _LeaveOneOut.of(_features(classifier, own, pixels), labels)
    found = {}
    for other in others:
        n = min(FIRST_IMAGES, len(pixels))
        features = _features(classifier, other, pixels[:n])
        first = _LeaveOneOut.of(features, labels.first(n))
        reference = _LeaveOneOut.of(of_own.features[:n], labels.first(n))
        if first.better_than(reference) > 0 and n < len(pixels):
            features = np.concatenate([features, _features(classifier, other, pixels[n:])])
            first, reference = _LeaveOneOut.of(features, labels), of_own
        found[other.name] = {
            "n": len(first.scores),
            "top1": float(first.scores.mean()),
            "own_top1": float(reference.scores.mean()),
            "z": first.better_than(reference),
        }
    return found


@dataclass(frozen=True)
class _Labels:
    """The targets of the images, for fitting a ridge head and for scoring its predictions."""

    task: Task
    targets: NDArray[Any]  # encoded by the task

    @cached_property
    def indicators(self) -> Features:
        """(N, C) 1 if an image has the label, else 0."""
        return self.task.indicators(self.targets)

    def first(self, n: int) -> _Labels:
        return _Labels(self.task, self.targets[:n])

    def scores(self, predicted: Features) -> NDArray[np.float64]:
        # The head is fitted to 0 and 1, so a label is predicted from 0.5 on.
        return self.task.image_results(predicted.astype(np.float32), self.targets, np.full(predicted.shape[1], 0.5)).score


@dataclass(frozen=True)
class _LeaveOneOut:
    """Leave-one-out predictions of a ridge head: each image is predicted by the head that was fitted without it."""

    features: Features  # (N, D)
    squared_errors: NDArray[np.float64]  # (N,) summed over the classes
    scores: NDArray[np.float64]  # (N,) from 0 to 1, by the task's metric

    @classmethod
    def of(cls, features: Features, labels: _Labels) -> _LeaveOneOut:
        """Fit with the ridge penalty that has the smallest leave-one-out error."""
        spread = features.std(axis=0)
        rows = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
        kernel = rows @ rows.T / max(rows.shape[1], 1) + 1.0  # the constant is the bias
        values, vectors = np.linalg.eigh(kernel)
        best: _LeaveOneOut | None = None
        for strength in STRENGTHS:
            inverse = (vectors / (values.clip(min=0) + strength)) @ vectors.T
            residuals = (inverse @ labels.indicators) / np.diagonal(inverse)[:, None]  # (N, C), leave-one-out (PRESS)
            found = cls(features, (residuals**2).sum(axis=1), labels.scores(labels.indicators - residuals))
            if best is None or found.squared_errors.mean() < best.squared_errors.mean():
                best = found
        assert best is not None
        return best

    def better_than(self, other: _LeaveOneOut) -> float:
        """Return by how many standard errors the mean squared error is smaller than that of `other` on the same images."""
        gains = other.squared_errors - self.squared_errors
        error = float(gains.std(ddof=1)) / np.sqrt(len(gains))
        return float(gains.mean() / error) if error > 0 else 0.0


def _divergences(classifier: Classifier, given: Normalisation, pixels: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    ordered = np.ascontiguousarray(pixels[..., ::-1]) if given.blue_first else pixels
    with _normalising(classifier, given):
        return divergences(classifier, ordered)


def _statistics_gain(own: NDArray[np.float64] | None, other: NDArray[np.float64] | None) -> dict[str, float] | None:
    """Return how much closer the activation statistics are to the running statistics in the weights with another normalisation.

    Args:
        own, other: divergences (groups of images, layers) with the present and with the other normalisation.

    Returns:
        gain: the mean over layers of the natural logarithm of the ratio of divergences; above 0, the other one is closer.
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
    """Return the embeddings (N, D) of pixels (N, h, w, 3) uint8, normalised as `given`."""
    ordered = np.ascontiguousarray(pixels[..., ::-1]) if given.blue_first else pixels
    with _normalising(classifier, given):
        batches = [ordered[start : start + BATCH_SIZE] for start in range(0, len(ordered), BATCH_SIZE)]
        rows = [classifier.embed(classifier.normalise(torch.from_numpy(batch))).numpy() for batch in batches]
    return np.concatenate(rows).astype(np.float64)


@contextmanager
def _normalising(classifier: Classifier, given: Normalisation) -> Iterator[None]:
    """Make the classifier normalise pixels as `given` in the block, and restore its own normalisation afterwards."""
    own = classifier._scale.clone(), classifier._shift.clone()
    mean, std = torch.tensor(given.mean), torch.tensor(given.std)
    classifier._scale.copy_((1 / (255 * std)).view(1, 3, 1, 1))
    classifier._shift.copy_((-mean / std).view(1, 3, 1, 1))
    try:
        yield
    finally:
        classifier._scale.copy_(own[0])
        classifier._shift.copy_(own[1])
