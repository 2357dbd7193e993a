"""The protocol of a task: everything that differs between single-label and multi-label classification.

A task defines how targets are encoded, the function from logits to probabilities, the decision made from them, the metrics, and
the form of a prediction. All of it is torch-free. What belongs to other layers is in their tables, under the task's name: its
name and losses in the job spec (`finetune.spec.tasks`), the objective of training (`finetune.training.objectives`), the solver of
the head (`finetune.features.heads`), what doubts labels during training (`finetune.training.label_doubts`) and in an examination
(`finetune.doctor.label_findings`), and what to label next (`finetune.labelling.queries`). No other module asks which task it is.
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
"""The target of a sample: the index of its class or, in a multi-label task, the sorted indices of all its labels."""

Logits = NDArray[np.floating[Any]]
Targets = NDArray[Any]  # as the task encodes them
Thresholds = NDArray[np.floating[Any]]
"""(N, C) or (C,): the least logit with which a label is given, in a multi-label task."""


class ImageResults(Protocol):
    """Per-image results from which a task's metrics are computed."""

    def __len__(self) -> int: ...

    @property
    def score(self) -> NDArray[np.float64]:
        """(N,) 1 where an image is predicted correctly, else 0; paired comparisons use it."""
        ...

    @property
    def nll(self) -> NDArray[np.float64]:
        """(N,) negative log-likelihood of each image's target, in nats."""
        ...


class Task(Protocol):
    """A classification task. Stateless: every method is a pure function."""

    @property
    def name(self) -> str:
        """The task's name in the job spec and in every bundle."""
        ...

    @property
    def description(self) -> str:
        """How many labels an image has, as the reason that is recorded for a task that was chosen by the labels."""
        ...

    @property
    def noun(self) -> str:
        """What one of the outputs is called in messages: a class, or a label."""
        ...

    @property
    def losses(self) -> tuple[str, ...]:
        """The losses that training can minimise, as named in the job spec. The first is the default and the solved head's."""
        ...

    @property
    def why_unsmoothed(self) -> str:
        """Why label smoothing is off by default, as recorded with that choice; empty: it is on, on data sets with many images."""
        ...

    @property
    def needs_every_class(self) -> bool:
        """Whether each class must have images of its own to train and to evaluate on, so that images are counted by class."""
        ...

    @property
    def why_no_prediction_sets(self) -> str:
        """Why a model can neither give prediction sets nor abstain, as the beginning of a sentence; empty: it can do both."""
        ...

    @property
    def probability_note(self) -> str:
        """A sentence on what the probabilities of `predicted_and_true_probabilities` are of; empty: of the whole prediction."""
        ...

    @property
    def reliability_axes(self) -> tuple[str, str, str]:
        """The titles of the reliability diagram's axes: the probability, the measured share, and what is counted."""
        ...

    @property
    def metrics(self) -> Sequence[Metric[Any]]:
        """The metrics that are reported, in the order of display."""
        ...

    @property
    def headline(self) -> Metric[Any]:
        """The metric by which the best epoch is chosen and models are tested; higher is better."""
        ...

    def leading(self, class_counts: Sequence[int]) -> Metric[Any]:
        """Return the metric that is reported first for a split with these numbers of images by class.

        It is a mean over classes if the numbers are very unequal, else the headline. It always has an interval. Choosing epochs
        and testing use the headline in any case.
        """
        ...

    @property
    def mean_score(self) -> Metric[Any]:
        """The metric that is the mean of `score` over images; equal to `headline` if that is such a mean."""
        ...

    def is_task_of(self, targets: Sequence[Target]) -> bool:
        """Return whether this task is chosen for these labels if the request says ``task: auto``."""
        ...

    def can_train_on(self, target: Target) -> bool:
        """Return whether an image with this target can be used for training."""
        ...

    def encode(self, targets: Sequence[Target], n_classes: int) -> Targets:
        """Return the targets as the array that training and evaluation use, with N as its first axis."""
        ...

    def indicators(self, targets: Targets) -> NDArray[np.float64]:
        """Return for encoded targets (N, C), 1 where an image has the class; C may end with the last class that has an image."""
        ...

    def strata(self, targets: Targets) -> NDArray[np.int64]:
        """Return (N,) the class by which each image is drawn in stratified subsets, for encoded targets."""
        ...

    def probabilities(self, logits: Logits, temperature: float = 1.0) -> NDArray[np.float64]:
        """Return the probability of each class, (N, C), for logits (N, C)."""
        ...

    def image_results(self, logits: Logits, targets: Targets, thresholds: Thresholds | None = None) -> ImageResults:
        """Compare logits (N, C) with encoded targets, image by image.

        Args:
            thresholds: from `choose_thresholds`; by default a label is given if its probability reaches 1/2.

        Raises:
            InvalidInput: there is no image, or the shapes do not match.
            TrainingError: a logit is NaN or infinite.
        """
        ...

    def chance(self, targets: Targets) -> float:
        """Return the headline metric of the best prediction that ignores the image."""
        ...

    def uniform_loss(self, n_classes: int) -> float:
        """Return the loss, in nats, of predicting the same probability for every class."""
        ...

    def learning_curve(self, rows: Any) -> Mapping[str, float]:
        """Return the figures of a learning curve by metric key: first the mean over images, last the mean over classes."""
        ...

    def class_counts(self, rows: Any) -> Sequence[tuple[int, int, int]]:
        """Return for each class the numbers of images that have it, that are predicted to have it, and where both hold."""
        ...

    def class_precisions(self, rows: Any) -> Sequence[tuple[float, Interval] | None]:
        """Return each class's average precision with its 95 % interval, None without images; empty in a single-label task."""
        ...

    def predicted_and_true_probabilities(self, rows: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (N,) probabilities of the images' predictions and (N,) probabilities of the truth.

        In a multi-label task they are those of one label per image: the most confident wrong decision or, if all decisions are
        correct, the least confident one.
        """
        ...

    def predicted_labels(self, rows: Any, row: int) -> tuple[int, ...]:
        """Return the class indices that are predicted for one image, in class order."""
        ...

    def prediction_text(self, rows: Any, row: int, classes: Sequence[str]) -> str:
        """Return the prediction for one image as text for display."""
        ...

    def facts(self, rows: Any) -> Mapping[str, float]:
        """Return figures that are reported beside the metrics but do not measure quality, by name."""
        ...

    def confusion(self, rows: Any) -> tuple[tuple[int, ...], ...] | None:
        """Return the (C, C) confusion matrix, by true and predicted class; None in a multi-label task."""
        ...

    def reliability_bins(self, rows: Any) -> tuple[ReliabilityBin, ...]:
        """Return the reliability diagram: the accuracy of predictions by bins of their probability."""
        ...

    def fit_temperature(self, logits: Logits, targets: Targets) -> Temperature:
        """Fit the temperature on held-out images."""
        ...

    def choose_thresholds(self, logits: Logits, targets: Targets) -> Thresholds | None:
        """Choose the (C,) thresholds of the logits on held-out images; None in a single-label task."""
        ...

    def default_thresholds(self, n_classes: int) -> tuple[float, ...] | None:
        """Return the (C,) least probabilities of labels in a bundle without thresholds; None if the decision takes none."""
        ...

    def probability_thresholds(self, thresholds: Thresholds, temperature: float) -> tuple[float, ...]:
        """Convert thresholds (C,) of logits to thresholds of the probabilities of a bundle with this temperature."""
        ...

    def logit_thresholds(self, thresholds: Sequence[float], temperature: float) -> Thresholds:
        """Convert thresholds (C,) of probabilities to thresholds of logits, the inverse of `probability_thresholds`."""
        ...

    def predict_labels(self, probs: NDArray[np.floating[Any]], thresholds: Sequence[float] | None) -> NDArray[np.int64]:
        """Return the predicted class indices of one image, most probable first.

        Args:
            probs: (C,).
            thresholds: (C,) of the probabilities; None: 1/2 for each label.
        """
        ...

    def balance(self, targets: Targets, n_classes: int, class_weights: ClassWeights, logit_adjustment: float) -> Balance:
        """Return how the loss treats class imbalance, for encoded training targets."""
        ...

    def label_text(self, target: Any, classes: Sequence[str]) -> str:
        """Return one encoded target as text for display: the name of its class, or the names of all its labels."""
        ...

    def labels_of(self, target: Any) -> tuple[int, ...]:
        """Return the class indices of one encoded target."""
        ...

    def cell_text(self, labels: Sequence[int], classes: Sequence[str]) -> str:
        """Return labels as text for a table cell: the class name or, in a multi-label task, a JSON list of names."""
        ...

    def ranking(self, probs: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """Return the class indices sorted by probs (C,) of one image, most probable first, ties in class order.

        A task without thresholds, whose decision is another class than the most probable one, puts that class first.
        """
        ...
