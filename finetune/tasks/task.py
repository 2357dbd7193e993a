"""What a task is: everything that depends on what a label means, for everything that does not know it.

A task with one label per image and one with several differ in how targets are encoded, in the function from logits to
probabilities, in what is decided from them, in the metrics, and in the shape of an answer. All of that is here, without torch.
The training loss of each task is in `finetune.training.objectives`, its solved head in `finetune.features.heads`, under its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.metrics import Metric
from finetune.metrics.calibration import ReliabilityBin
from finetune.metrics.temperature import Temperature

Target = int | tuple[int, ...]
"""The label of a sample: the index of its class; where a sample may have several labels, the sorted indices of all."""

Logits = NDArray[np.floating[Any]]
Targets = NDArray[Any]  # as the task encodes them


class JudgedRows(Protocol):
    """One value an image, as a task's metrics need them."""

    def __len__(self) -> int: ...

    @property
    def score(self) -> NDArray[np.float64]:
        """(N,) how well each image was answered, 0 to 1; the basis of paired comparisons."""
        ...

    @property
    def nll(self) -> NDArray[np.float64]:
        """(N,) negative log-likelihood of each image's target, in nats."""
        ...


class Task(Protocol):
    """One kind of labelling. Stateless: every method is a pure function."""

    @property
    def name(self) -> str:
        """As in the job spec and in every bundle."""
        ...

    @property
    def metrics(self) -> Sequence[Metric[Any]]:
        """What is reported, in the order in which people read it."""
        ...

    @property
    def headline(self) -> Metric[Any]:
        """The metric that chooses between weights and is told first; higher is better."""
        ...

    def encode(self, targets: Sequence[Target], n_classes: int) -> Targets:
        """Return the targets as the array that training and evaluation work on, N in its first axis."""
        ...

    def probabilities(self, logits: Logits, temperature: float = 1.0) -> NDArray[np.float64]:
        """Return the probability of each class, (N, C), for logits (N, C)."""
        ...

    def judge(self, logits: Logits, targets: Targets) -> JudgedRows:
        """Compare logits (N, C) with encoded targets, image by image.

        Raises:
            InvalidInput: no image, or shapes that do not fit each other.
            TrainingError: a logit is NaN or infinite.
        """
        ...

    def chance(self, targets: Targets) -> float:
        """Return the headline metric of the best answer that does not look at the image."""
        ...

    def class_counts(self, rows: Any) -> Sequence[tuple[int, int, int]]:
        """Return for each class: images that have it, images that were given it, and images where both hold."""
        ...

    def confusion(self, rows: Any) -> tuple[tuple[int, ...], ...] | None:
        """Return counts by true and predicted class, (C, C); None where labels do not exclude each other."""
        ...

    def reliability_bins(self, rows: Any) -> tuple[ReliabilityBin, ...]:
        """Return how often answers were right, by the probability that they were given with."""
        ...

    def fit_temperature(self, logits: Logits, targets: Targets) -> Temperature:
        """Return the divisor of the logits that makes probabilities fit these held-out images best."""
        ...

    def label_text(self, target: Any, classes: Sequence[str]) -> str:
        """Return one encoded target as text: the class name, or the names of all its classes."""
        ...

    def ranking(self, probs: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """Return class indices by their probability for one image, the most probable first, ties in class order."""
        ...
