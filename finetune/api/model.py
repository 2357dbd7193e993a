"""A loaded model and its predictions, for Python and notebooks. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.calibration import NO_CERTAINTY, NO_OPTIONS, Certainty, CertaintyOptions
from finetune.bundle.predictor import Predictor, SeveralLabels
from finetune.data.dataset import LocalFile, Sample
from finetune.errors import InvalidInput
from finetune.evaluation.of_bundle import BundleEvaluation, evaluate_bundle
from finetune.evaluation.predict import SamplePrediction, UnreadableSample, predict_samples
from finetune.progress_bars import progress_bars

ImageLike = str | Path | bytes | NDArray[np.uint8]


@dataclass(frozen=True)
class ImagePrediction:
    """A model's prediction for one image."""

    labels: tuple[tuple[str, float], ...]  # (class, probability), the most probable first
    embedding: NDArray[np.float32]  # (D,)
    cam: NDArray[np.float32] | None  # (h', w') class activation map of the first label; None if the head allows none
    image: NDArray[np.uint8]  # (h, w, 3) the preprocessed image
    certainty: Certainty = NO_CERTAINTY  # what was asked for: the prediction set `labels`, abstained, reason, novelty
    several: SeveralLabels | None = None  # of a multi-label model: `given`, `scores` and `thresholds`

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.labels[0][0]

    @property
    def probability(self) -> float:
        """The probability of the most probable class."""
        return self.labels[0][1]

    @property
    def given(self) -> tuple[str, ...]:
        """The predicted labels: the most probable class or, of a multi-label model, all that reach their thresholds."""
        return (self.label,) if self.several is None else self.several.given

    def __repr__(self) -> str:
        labels = self.labels[:3]
        if self.several is not None:
            labels = tuple((name, self.several.scores[name]) for name in self.several.given)
        shown = ", ".join(f"{label} {probability:.1%}" for label, probability in labels)
        return f"<{shown or 'no label'}>"

    def _repr_html_(self) -> str:
        from finetune.bundle.overlay import overlay_png
        from finetune.report.pictures import data_uri, thumbnail
        from finetune.report.templates import render

        pictures = [data_uri(thumbnail(self.image), "image/jpeg")]
        if self.cam is not None:
            pictures.append(data_uri(overlay_png(self.image, self.cam), "image/png"))
        return render("notebook_answer.html", pictures=pictures, labels=self.labels[:5])


class Model:
    """A loaded bundle, which predicts exactly as the server does. Torch-free."""

    def __init__(self, folder: Path) -> None:
        """Load and verify the bundle in `folder`.

        Raises:
            BundleError: a file is missing or changed, or the bundle does not reproduce its recorded outputs here.
        """
        self.folder = folder
        self._predictor = Predictor.load(folder)

    @property
    def name(self) -> str:
        return self._predictor.manifest.name

    @property
    def version(self) -> str | None:
        return self._predictor.manifest.version

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the model's outputs."""
        return self._predictor.manifest.classes

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the run that made the model, under ``split/name`` keys."""
        return self._predictor.manifest.metrics

    def predict(self, image: ImageLike, options: CertaintyOptions = NO_OPTIONS) -> ImagePrediction:
        """Classify one image: a path, the bytes of an image file, or (H, W, 3) uint8 RGB pixels.

        Args:
            options: requests a prediction set or abstention: ``finetune.CertaintyOptions(coverage=0.9, abstain=True)``.

        Raises:
            ImageError: the image cannot be read.
            InvalidInput: there is no such file, the array is not an image, or the bundle has no calibration for the requested
                coverage or precision.
        """
        options = self._predictor.estimator.resolved(options)
        if isinstance(image, np.ndarray):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise InvalidInput(
                    f"an image array has the shape (H, W, 3) and the type uint8, given {image.shape} {image.dtype}. Convert "
                    "it to RGB pixels from 0 to 255, or give the path or the bytes of an image file"
                )
            pixels = self._predictor.manifest.preprocess(image)
            outputs = self._predictor.run(pixels[None])
            cam = None if outputs.cam is None else outputs.cam[0]
            return self._image_prediction(outputs.probs[0], outputs.embedding[0], cam, pixels, options)
        if not isinstance(image, bytes | str | Path):
            raise InvalidInput(
                f"an image is a path, the bytes of an image file, or an array of RGB pixels, given {type(image).__name__}"
            )
        if not isinstance(image, bytes) and not Path(image).is_file():
            raise InvalidInput(f"{image}: no such image file")
        sample = Sample("image", _Bytes(image) if isinstance(image, bytes) else LocalFile(Path(image)), ())
        (prediction,) = predict_samples(self._predictor, [sample])
        if isinstance(prediction, UnreadableSample):
            raise prediction.error
        return self._to_image_prediction(prediction, options)

    def predict_many(
        self, images: Sequence[str | Path], options: CertaintyOptions = NO_OPTIONS, *, progress: bool = True
    ) -> list[ImagePrediction | UnreadableSample]:
        """Classify many image files; return results in the order given, `UnreadableSample` for files that cannot be read."""
        options = self._predictor.estimator.resolved(options)
        samples = [Sample(str(path), LocalFile(Path(path)), ()) for path in images]
        with progress_bars(shown=progress) as update:
            predicted = list(predict_samples(self._predictor, samples, what=f"{len(samples):,} images", progress=update))
        return [
            prediction if isinstance(prediction, UnreadableSample) else self._to_image_prediction(prediction, options)
            for prediction in predicted
        ]

    def evaluate(self, data: str | Path, split: str | None = None, *, progress: bool = True) -> BundleEvaluation:
        """Evaluate the model on labelled images, and count how many of them it was trained on."""
        with progress_bars(shown=progress) as update:
            return evaluate_bundle(self.folder, data, split, update)

    def _to_image_prediction(self, prediction: SamplePrediction, options: CertaintyOptions) -> ImagePrediction:
        return self._image_prediction(prediction.probs, prediction.embedding, prediction.cam, prediction.image, options)

    def _image_prediction(
        self,
        probs: NDArray[np.float32],
        embedding: NDArray[np.float32],
        cam: NDArray[np.float32] | None,
        image: NDArray[np.uint8],
        options: CertaintyOptions,
    ) -> ImagePrediction:
        order = self._predictor.task.ranking(probs)
        labels = tuple((self.classes[index], float(probs[index])) for index in order)
        certainty = self._predictor.estimator.estimate(probs, embedding, options)
        return ImagePrediction(labels, embedding, cam, image, certainty, self._predictor.several_labels(probs))

    def __repr__(self) -> str:
        version = "" if self.version is None else f"@{self.version}"
        return f"<model {self.name}{version}: {len(self.classes)} classes>"


@dataclass(frozen=True)
class _Bytes:
    """An image file in memory."""

    data: bytes

    def read(self, limits: Any = None) -> bytes:
        return self.data

    def __str__(self) -> str:
        return "the image"
