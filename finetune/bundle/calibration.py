"""Apply the calibration of a model to new predictions: prediction sets with a given coverage, and abstention. Torch-free.

The thresholds are computed from predictions on held-out images by `finetune.evaluation.calibrate` and stored in ``bundle.json``
under ``calibration.held_out``; the subspace of the embeddings of known images is stored in ``novelty.npz``.
"""

from __future__ import annotations

import bisect
import io
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from finetune.bundle.manifest import NOVELTY
from finetune.errors import BundleError, InvalidInput, Problem
from finetune.metrics.novelty import Subspace
from finetune.storage.files import write_atomic

HELD_OUT = "held_out"  # the key in ``calibration``

LEVELS = tuple(f"{percent / 100:.2f}" for percent in range(50, 100))
"""The coverages and precisions that a bundle has thresholds for; a request between two of them gets the higher one."""

CLASS_LEVELS = ("0.80", "0.90", "0.95")
NOVEL = 0.95
"""An image counts as unlike the known ones if it is farther from them than this share of the held-out images."""

DEFAULT_PRECISION = 0.95

Reason = Literal["unsure", "unlike"]


@dataclass(frozen=True)
class CertaintyOptions:
    """The options of a prediction besides labels and probabilities.

    Args:
        coverage: probability with which the prediction set must contain the right label; None: no set is returned.
        per_class: whether that probability must be reached for each class separately.
        abstain: whether to abstain where the model is not reliable; None: as the model's owner has chosen.
        precision: required share of correct predictions among those that are not abstained from; None: as the owner has chosen,
            else `DEFAULT_PRECISION`.
    """

    coverage: float | None = None
    per_class: bool = False
    abstain: bool | None = None
    precision: float | None = None


NO_OPTIONS = CertaintyOptions()


@dataclass(frozen=True)
class Certainty:
    """The prediction set and the abstention for one prediction. Parts that were not asked for are None."""

    labels: tuple[str, ...] | None = None  # the prediction set, the most probable first; never empty
    coverage: float | None = None  # of the prediction set
    abstained: bool | None = None
    reason: Reason | None = None  # why it abstained: the probability is too low, or the image is unlike the known ones
    novelty: float | None = None  # share of the held-out images that are closer to the known ones than this image

    def to_dict(self) -> dict[str, Any]:
        """Return the parts that were asked for as JSON values, under the keys of ``/predict``."""
        found: dict[str, Any] = {}
        if self.labels is not None:
            found["prediction_set"] = {"coverage": self.coverage, "labels": list(self.labels)}
        if self.abstained is not None:
            found |= {"abstained": self.abstained, "reason": self.reason, "novelty": self.novelty}
        return found


NO_CERTAINTY = Certainty()


@dataclass(frozen=True)
class OperatingPoint:
    """The operating point of abstention for one precision."""

    threshold: float  # of the probability of the most probable class
    answered: float  # share of the held-out images that are answered


@dataclass(frozen=True)
class Calibration:
    """Thresholds that were computed from predictions on held-out images."""

    split: str  # of the held-out images: val, or cv for those of all folds
    n: int  # held-out images
    coverage: Mapping[str, float] = field(default_factory=dict)  # level -> smallest probability of a label in the set
    class_coverage: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)  # level -> the same for each class
    precision: Mapping[str, OperatingPoint] = field(default_factory=dict)  # level -> operating point
    novelty: tuple[float, ...] = ()  # distances that 1 %, 2 % … of the held-out images do not exceed; empty if not known
    checked: Mapping[str, Any] = field(default_factory=dict)  # coverage and precision measured on the test images

    def to_dict(self) -> dict[str, Any]:
        """Return the thresholds as JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, calibration: Mapping[str, Any]) -> Calibration | None:
        """Return the thresholds in the entry ``calibration`` of a manifest; None if the bundle has none.

        Raises:
            BundleError: the entry is not valid.
        """
        if HELD_OUT not in calibration:
            return None
        try:
            return _ADAPTER.validate_python(calibration[HELD_OUT])
        except ValidationError as error:
            raise BundleError(f"calibration.{HELD_OUT} of the bundle is not valid: {error.errors()[0]['msg']}") from None

    def threshold_of_coverage(self, coverage: float) -> tuple[float, float]:
        """Return the smallest probability of a label in the prediction set, and the coverage of the set.

        Raises:
            InvalidInput: the coverage is not between 0.5 and 0.99, or there are too few held-out images for it.
        """
        level = _level(LEVELS, coverage, "coverage")
        if level not in self.coverage:
            raise self._too_few("coverage", coverage, max(self.coverage, default=None))
        return self.coverage[level], float(level)

    def thresholds_of_classes(self, coverage: float) -> tuple[tuple[float, ...], float]:
        """Return the smallest probability for each class (0 for a class with too few images), and the coverage of each class."""
        level = _level(CLASS_LEVELS, coverage, "coverage", " for each class")
        return tuple(threshold or 0.0 for threshold in self.class_coverage[level]), float(level)

    def operating_point(self, precision: float) -> OperatingPoint:
        """Return the operating point for a precision.

        Raises:
            InvalidInput: the precision is not between 0.5 and 0.99, or is more than the held-out images can show.
        """
        level = _level(LEVELS, precision, "precision")
        if level not in self.precision:
            raise self._too_few("precision", precision, max(self.precision, default=None))
        return self.precision[level]

    def novelty_of(self, distance: float) -> float:
        """Return the share of held-out images, in whole percent, with a smaller distance from the known images."""
        return bisect.bisect_left(self.novelty, distance) / 100

    def _too_few(self, what: str, asked: float, best: str | None) -> InvalidInput:
        known = f"the highest possible {what} is {best}" if best else f"they are too few for any {what}"
        return InvalidInput(
            f"The {self.n:,} held-out images of this model are too few for a {what} of {asked:g}: {known}. Ask for less, or "
            "train with more validation images or with folds (data.folds)",
            [Problem(what, f"must be at most {best}" if best else "is not available for this model")],
        )


_ADAPTER = TypeAdapter(Calibration)


def _level(levels: tuple[str, ...], asked: float, what: str, of: str = "") -> str:
    """Return the lowest level that is at least `asked`.

    Args:
        what: name of the quantity, for the error.

    Raises:
        InvalidInput: there is no such level.
    """
    found = next((level for level in levels if float(level) >= asked - 1e-9), None)
    if found is None or not float(LEVELS[0]) <= asked:
        message = f"must be between {LEVELS[0]} and {levels[-1]}{of}"
        raise InvalidInput(f"{what} {message} (given: {asked:g})", [Problem(what, message)])
    return found


class CertaintyEstimator:
    """Computes prediction sets and abstention for the predictions of one model.

    Args:
        classes: in the order of the probabilities.
        calibration: None if the bundle has none; then neither is available.
        subspace: of the embeddings of known images; None if the bundle has none.
        owner_precision: precision with which the model's owner has switched abstention on; None: it is off.
        unavailable: why neither is available for any model of this task, as `Task.why_no_prediction_sets` says; empty: they are.
    """

    def __init__(
        self,
        classes: tuple[str, ...],
        calibration: Calibration | None,
        subspace: Subspace | None,
        owner_precision: float | None = None,
        *,
        unavailable: str = "",
    ) -> None:
        self._unavailable = unavailable
        self.calibration = calibration
        self._classes = classes
        self.subspace = subspace
        self._owner_precision = owner_precision

    def resolved(self, options: CertaintyOptions) -> CertaintyOptions:
        """Return the options with the owner's choices in place of None, after checking that they are available.

        Raises:
            InvalidInput: the bundle has no calibration, or its held-out images are too few for the requested values.
        """
        switched_on = options.precision is not None or self._owner_precision is not None
        abstain = switched_on if options.abstain is None else options.abstain
        precision = options.precision if options.precision is not None else self._owner_precision or DEFAULT_PRECISION
        if options.per_class and options.coverage is None:
            raise InvalidInput("per_class needs a coverage, as in coverage=0.9", [Problem("per_class", "needs a coverage")])
        if abstain or options.coverage is not None:
            asks_precision = options.abstain is None and options.precision is not None
            abstaining = "precision" if asks_precision else "abstain"
            calibration = self._calibration(abstaining if options.coverage is None else "coverage")
            if abstain:
                calibration.operating_point(precision)
            if options.coverage is not None:
                self._thresholds(options.coverage, options.per_class)
        return CertaintyOptions(options.coverage, options.per_class, abstain, precision if abstain else None)

    def estimate(
        self, probs: NDArray[np.floating[Any]], embedding: NDArray[np.floating[Any]], options: CertaintyOptions
    ) -> Certainty:
        """Return the prediction set and the abstention for one image, as far as they are asked for.

        Args:
            probs, embedding: (C,) and (D,) of the image.
            options: as `resolved` returned it.
        """
        labels, coverage = (None, None) if options.coverage is None else self._set(probs, options.coverage, options.per_class)
        if not options.abstain or options.precision is None:
            return Certainty(labels, coverage)
        calibration = self._calibration("abstain")
        novelty = None
        if self.subspace is not None and calibration.novelty:
            novelty = calibration.novelty_of(float(self.subspace.distances(embedding[None])[0]))
        unsure = float(probs.max()) < calibration.operating_point(options.precision).threshold
        reason: Reason | None = "unlike" if novelty is not None and novelty >= NOVEL else "unsure" if unsure else None
        return Certainty(labels, coverage, reason is not None, reason, novelty)

    def _set(self, probs: NDArray[np.floating[Any]], coverage: float, per_class: bool) -> tuple[tuple[str, ...], float]:
        thresholds, level = self._thresholds(coverage, per_class)
        order = np.argsort(-probs, kind="stable")
        inside = probs >= np.asarray(thresholds)
        # The most probable label always belongs to the set: an empty set is of no use, and this can only raise the coverage.
        return tuple(self._classes[label] for label in order if inside[label] or label == order[0]), level

    def _thresholds(self, coverage: float, per_class: bool) -> tuple[float | tuple[float, ...], float]:
        """Return the smallest probability of a label in the set, or one for each class; and the coverage of the set."""
        calibration = self._calibration("coverage")
        return calibration.thresholds_of_classes(coverage) if per_class else calibration.threshold_of_coverage(coverage)

    def _calibration(self, what: str) -> Calibration:
        """Return the calibration of the bundle.

        Args:
            what: the option that needs it, for the error.

        Raises:
            InvalidInput: models of this task have none, or this bundle has none.
        """
        if self._unavailable:
            raise InvalidInput(
                f"{self._unavailable}, so {what} does not apply to it: leave it out, and read the labels and their probabilities",
                [Problem(what, "is for models that give exactly one label")],
            )
        if self.calibration is None:
            raise InvalidInput(
                "This model cannot say how far to rely on its answers: its bundle was made without calibration on held-out "
                "images. Calibration needs at least 20 of them; bundles of early versions of finetune have none. Train the model "
                f"again with more images, or ask without {what}",
                [Problem(what, "needs a bundle with calibration on held-out images")],
            )
        return self.calibration


def write_subspace(path: Path, subspace: Subspace) -> None:
    """Write the subspace of known images as plain arrays, without pickle."""
    arrays: dict[str, Any] = {"mean": subspace.mean, "components": subspace.components}
    write_atomic(path, lambda stream: np.savez(stream, allow_pickle=False, **arrays))


def parse_subspace(folder: Path, data: bytes) -> Subspace:
    """Return the subspace in the content of a file that `write_subspace` wrote.

    Raises:
        BundleError: the content cannot be read.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return Subspace(arrays["mean"], arrays["components"])
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(f"{folder}: {NOVELTY} cannot be read: {error}. Export the bundle again") from None
