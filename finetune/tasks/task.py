"""What a task is: everything that depends on what a label means, for everything that does not know it.

A task with one label per image and one with several differ in how targets are encoded, in the function from logits to
probabilities, in what is decided from them, in the metrics, and in the shape of an answer. All of that is here, without torch.
The training loss of each task is in `finetune.training.objectives`, its solved head in `finetune.features.heads`, under its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.metrics import Interval, Metric
from finetune.metrics.calibration import ReliabilityBin
from finetune.metrics.temperature import Temperature
from finetune.tasks.balance import Balance, ClassWeights

Target = int | tuple[int, ...]
"""The label of a sample: the index of its class; where a sample may have several labels, the sorted indices of all."""

Logits = NDArray[np.floating[Any]]
Targets = NDArray[Any]  # as the task encodes them
Thresholds = NDArray[np.floating[Any]]
"""(N, C) or (C,): the logit from which on a label is given, where labels do not exclude each other."""


class JudgedRows(Protocol):
    """One value an image, as a task's metrics need them."""

    def __len__(self) -> int: ...

    @property
    def score(self) -> NDArray[np.float64]:
        """(N,) whether each image was answered rightly, 0 or 1; the basis of paired comparisons."""
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
    def exclusive(self) -> bool:
        """Whether an image has exactly one label, so that an answer is right or wrong as a whole and a set may be asked for."""
        ...

    @property
    def losses(self) -> tuple[str, ...]:
        """What training by steps can minimise, by its names in the job spec; the first by default, and in a solved head."""
        ...

    @property
    def smooths_labels(self) -> bool:
        """Whether label smoothing is used by default where there are many images."""
        ...

    @property
    def metrics(self) -> Sequence[Metric[Any]]:
        """What is reported, in the order in which people read it."""
        ...

    @property
    def headline(self) -> Metric[Any]:
        """The metric that chooses between weights, and that is told first unless `leading` is another; higher is better."""
        ...

    def leading(self, class_counts: Sequence[int]) -> Metric[Any]:
        """Return the metric that is told first of images with so many of each class: a mean over classes where these are unequal.

        It is the headline, or another metric with an interval. What is chosen and tested by is the headline all the same.
        """
        ...

    @property
    def of_images(self) -> Metric[Any]:
        """The metric that is the mean over images of their `score`: the headline itself, where that is such a mean."""
        ...

    def describes(self, targets: Sequence[Target]) -> bool:
        """Return whether these labels ask for this task where the request leaves it open."""
        ...

    def learns(self, target: Target) -> bool:
        """Return whether an image with these labels can be learnt from."""
        ...

    def encode(self, targets: Sequence[Target], n_classes: int) -> Targets:
        """Return the targets as the array that training and evaluation work on, N in its first axis."""
        ...

    def probabilities(self, logits: Logits, temperature: float = 1.0) -> NDArray[np.float64]:
        """Return the probability of each class, (N, C), for logits (N, C)."""
        ...

    def judge(self, logits: Logits, targets: Targets, thresholds: Thresholds | None = None) -> JudgedRows:
        """Compare logits (N, C) with encoded targets, image by image.

        Args:
            thresholds: that `choose_thresholds` gave; by default what is more probable than not.

        Raises:
            InvalidInput: no image, or shapes that do not fit each other.
            TrainingError: a logit is NaN or infinite.
        """
        ...

    def chance(self, targets: Targets) -> float:
        """Return the headline metric of the best answer that does not look at the image."""
        ...

    def blind_loss(self, n_classes: int) -> float:
        """Return the loss of giving every class the same probability, in nats."""
        ...

    def class_counts(self, rows: Any) -> Sequence[tuple[int, int, int]]:
        """Return for each class: images that have it, images that were given it, and images where both hold."""
        ...

    def class_precisions(self, rows: Any) -> Sequence[tuple[float, Interval] | None]:
        """Return the average precision of each class with its 95 % interval; empty where classes are not ranked by themselves."""
        ...

    def sureness(self, rows: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the probability of each image's answer, and that of what is true; each (N,).

        Where an image may have several labels, these are of one of them: of the surest that was answered wrongly, else of the
        least sure.
        """
        ...

    def answered(self, rows: Any, row: int) -> tuple[int, ...]:
        """Return the class indices that one image was answered with, in class order."""
        ...

    def answer_text(self, rows: Any, row: int, classes: Sequence[str]) -> str:
        """Return what one image was answered with as text for people."""
        ...

    def facts(self, rows: Any) -> Mapping[str, float]:
        """Return what is told beside the metrics and is no measure of quality, by name."""
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

    def choose_thresholds(self, logits: Logits, targets: Targets) -> Thresholds | None:
        """Return the logit (C,) from which on each label is given, chosen on held-out images; None where no label has its own."""
        ...

    def probability_thresholds(self, thresholds: Thresholds, temperature: float) -> tuple[float, ...]:
        """Return thresholds (C,) of logits as those of the probabilities that a bundle with this temperature gives."""
        ...

    def logit_thresholds(self, thresholds: Sequence[float], temperature: float) -> Thresholds:
        """Return the inverse of `probability_thresholds`."""
        ...

    def given(self, probs: NDArray[np.floating[Any]], thresholds: Sequence[float] | None) -> NDArray[np.int64]:
        """Return the labels that one image is given, the most probable first.

        Args:
            thresholds: (C,) of the probabilities; one half where there are none.
        """
        ...

    def balance(self, targets: Targets, n_classes: int, class_weights: ClassWeights, logit_adjustment: float) -> Balance:
        """Return what is done about classes of different size, for encoded training targets."""
        ...

    def label_text(self, target: Any, classes: Sequence[str]) -> str:
        """Return one encoded target as text for people: the class name, or the names of all its classes."""
        ...

    def labels_of(self, target: Any) -> tuple[int, ...]:
        """Return the class indices of one encoded target."""
        ...

    def cell_text(self, labels: Sequence[int], classes: Sequence[str]) -> str:
        """Return labels as the cell of a table: the class name, or a JSON list of names where an image may have several."""
        ...

    def ranking(self, probs: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """Return class indices by their probability for one image, the most probable first, ties in class order."""
        ...
