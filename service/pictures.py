"""The images of datasets for display: looked up by sample id, as original files or as thumbnails.

An id is looked up among the samples of the dataset and never used as a path.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.bundle.image import decode_image
from finetune.bundle.image_formats import sniff
from finetune.bundle.image_limits import ImageLimits
from finetune.data.archive import ArchiveError
from finetune.data.dataset import Dataset, Sample
from finetune.data.index import index_dataset
from finetune.data.intake import listed, needs_child_process
from finetune.data.reading import reading_of
from finetune.errors import DataError, MissingExtra, NotFound, UnsupportedImage
from finetune.evaluation.predictions import Predictions
from finetune.spec import DataSpec
from finetune.tasks import task_named

DATASETS_REMEMBERED = 8
DECODED_AT_ONCE = 2
_JPEG_QUALITY = 80
_SHOWN = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "AVIF": "image/avif"}
MEDIA_TYPES = tuple(_SHOWN.values())  # of pictures that browsers show


@dataclass(frozen=True)
class Pictures:
    """The samples of one dataset by id."""

    dataset: Dataset
    samples: Mapping[str, Sample]

    def sample(self, sample_id: str) -> Sample:
        """Return the sample with this id. Raises NotFound if the dataset does not have it."""
        found = self.samples.get(sample_id)
        if found is None:
            raise NotFound(f"no image {sample_id[:200]!r} in this dataset")
        return found


class PictureIndex:
    """A cache of recently used datasets. Uploads never change, so they need to be listed only once."""

    def __init__(self, limits: ImageLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._decoding = threading.Semaphore(DECODED_AT_ONCE)
        self._known: OrderedDict[tuple[Path | str, ...], Pictures] = OrderedDict()

    def of(
        self, training: Path, validation: Path | None = None, test: Path | None = None, data: Mapping[str, Any] | None = None
    ) -> Pictures:
        """Return the images of a dataset.

        Args:
            data: how it is to be read, the section `data` of a job spec.

        Raises:
            NotFound: the data no longer exists, or its images are cells of a table, which are not displayed.
        """
        reading = DataSpec.model_validate(data or {})
        named = {"training_file": training, "validation_file": validation, "test_file": test}
        locations = {name: path for name, path in named.items() if path is not None}
        key: tuple[Path | str, ...] = (*locations.values(), reading.model_dump_json())
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        try:
            if any(map(needs_child_process, locations.values())):
                dataset = listed(locations, reading)
            else:
                dataset = index_dataset(training, validation, test, for_training=False, reading=reading_of(reading))
        except (DataError, ArchiveError, MissingExtra):
            raise NotFound("The pictures are not available: the dataset was deleted, or can no longer be read") from None
        if not dataset.samples:
            raise NotFound("The pictures are cells of a table. They are used in training, but not shown here")
        found = Pictures(dataset, {sample.id: sample for sample in dataset.samples})
        with self._lock:
            self._known[key] = found
            while len(self._known) > DATASETS_REMEMBERED:
                self._known.popitem(last=False)
        return found

    def forget(self, training: Path) -> None:
        """Remove a deleted dataset from the cache."""
        with self._lock:
            for key in [key for key in self._known if training in key]:
                del self._known[key]

    def encoded(self, sample: Sample, side_px: int | None) -> tuple[bytes, str]:
        """Return an image and its media type: the original file, or a JPEG of at most `side_px` width and height.

        Raises:
            ImageError: the image cannot be read.
        """
        data = sample.read()
        if side_px is None:
            return data, _media_type(data)
        with self._decoding:
            return sample.decode(
                lambda data: _thumbnail(decode_image(data, short_side_px=side_px, limits=self._limits), side_px)
            ), "image/jpeg"


def _media_type(data: bytes) -> str:
    try:
        return _SHOWN.get(sniff(data), "application/octet-stream")
    except UnsupportedImage:
        return "application/octet-stream"


def _thumbnail(pixels: np.ndarray, side_px: int) -> bytes:
    image = Image.fromarray(pixels)
    image.thumbnail((side_px, side_px), Image.Resampling.BOX, reducing_gap=None)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()


@dataclass(frozen=True)
class Answer:
    """A model's prediction for one image of a split."""

    id: str
    label: str  # the class or, in a multi-label task, all labels as text
    answer: str
    labels: tuple[str, ...]  # true labels
    given: tuple[str, ...]  # predicted labels
    probability: float  # of the prediction
    label_probability: float


def answers_of(table: Predictions, keep: Callable[[Answer], bool]) -> list[Answer]:
    """Return the predictions for which `keep` is true, most confident first."""
    task, rows = task_named(table.task), table.image_results()
    probability, label_probability = task.predicted_and_true_probabilities(rows)
    found = [
        Answer(
            id=sample_id,
            label=task.label_text(table.labels[row], table.classes),
            answer=task.prediction_text(rows, row, table.classes),
            labels=tuple(table.classes[one] for one in task.labels_of(table.labels[row])),
            given=tuple(table.classes[one] for one in task.predicted_labels(rows, row)),
            probability=float(probability[row]),
            label_probability=float(label_probability[row]),
        )
        for row, sample_id in enumerate(table.ids)
    ]
    return sorted(filter(keep, found), key=lambda answer: (-answer.probability, answer.id))
