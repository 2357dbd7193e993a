"""Run a bundle on many images: labelled data for an evaluation, or any files and folders. Torch-free."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.image_limits import DEFAULT_LIMITS, ImageLimits
from finetune.bundle.predictor import Predictor
from finetune.data.dataset import LocalFile, Sample, targets_of
from finetune.data.parallel import ordered_map
from finetune.data.places import image_files
from finetune.errors import ImageError
from finetune.evaluation.predictions import Predictions, digests_as_rows
from finetune.progress import Progress, ProgressCallback, silent
from finetune.runtime.cores import available_cores
from finetune.tasks import task_named

BATCH_SIZE = 16  # where ONNX Runtime is fastest on a CPU


@dataclass(frozen=True)
class SamplePrediction:
    """A bundle's outputs for one image."""

    sample: Sample  # with the sha256 of its bytes
    image: NDArray[np.uint8]  # (h, w, 3) the preprocessed image that the model was given
    probs: NDArray[np.float32]  # (C,)
    logits: NDArray[np.float32]  # (C,)
    embedding: NDArray[np.float32]  # (D,)
    cam: NDArray[np.float32] | None  # (h', w') of the most probable class


@dataclass(frozen=True)
class UnreadableSample:
    """An image that could not be read, and why."""

    sample: Sample
    error: ImageError


def predict_samples(
    predictor: Predictor, samples: Sequence[Sample], *, what: str = "", progress: ProgressCallback = silent
) -> Iterator[SamplePrediction | UnreadableSample]:
    """Yield the outputs for every sample, in the order given, or why it could not be read. Background threads decode ahead.

    Args:
        what: named in the progress message.
    """
    cores = available_cores()
    waiting: list[tuple[Sample, NDArray[np.uint8]] | UnreadableSample] = []
    done = 0
    results = ordered_map(lambda sample: _decode(predictor, sample), samples, threads=cores, ahead=max(2 * cores, 2 * BATCH_SIZE))
    with contextlib.closing(results):
        for decoded in results:
            waiting.append(decoded)
            if len(waiting) == BATCH_SIZE:
                yield from _predict_batch(predictor, waiting)
                done += len(waiting)
                waiting = []
                progress(Progress("evaluating", done, len(samples), "images", message=f"predicting {what}".strip()))
        yield from _predict_batch(predictor, waiting)
    progress(Progress("evaluating", len(samples), len(samples), "images", message=f"predicting {what}".strip()))


def predictions_table(predicted: Sequence[SamplePrediction], predictor: Predictor, split: str, *, labelled: bool) -> Predictions:
    """Return predictions of a bundle as one table, with targets if the samples are `labelled`."""
    manifest = predictor.manifest
    n_classes = len(manifest.classes)
    samples = [prediction.sample for prediction in predicted]
    task = task_named(manifest.task)
    table = Predictions(
        split=split,
        task=task.name,
        classes=manifest.classes,
        ids=tuple(sample.id for sample in samples),
        sha256=digests_as_rows([sample.sha256 for sample in samples]),
        targets=task.encode(targets_of(samples), n_classes) if labelled else None,
        logits=np.stack([prediction.logits for prediction in predicted]) if predicted else np.empty((0, n_classes), np.float32),
        embedding=np.stack([prediction.embedding for prediction in predicted]) if predicted else None,
    )
    if manifest.thresholds is None:
        return table
    temperature = float(manifest.calibration.get("temperature", 1.0))
    return table.with_thresholds(task.logit_thresholds(manifest.thresholds, temperature))


@dataclass(frozen=True)
class MissingFile:
    """An image file that does not exist. Reading it raises an `ImageError` with the reason."""

    reason: str

    def read(self, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
        raise ImageError(self.reason)


def image_samples(paths: Sequence[Path]) -> list[Sample]:
    """Return a sample for each image file among `paths`, in folders and matched by patterns (``*.jpg``), in the order given.

    Any other path becomes a sample that cannot be read (`MissingFile`), so that it appears in the results as an error.
    """
    samples: list[Sample] = []
    for path in paths:
        if path.is_dir():
            found, missing = image_files(path), f"{path}: no image file in this folder"
        elif path.is_file():
            found, missing = [path], ""
        else:
            pattern = () if path.is_absolute() else Path().glob(str(path))
            found, missing = sorted(match for match in pattern if match.is_file()), f"{path}: no such image file"
        samples += [Sample(str(file), LocalFile(file), ()) for file in found] or [Sample(str(path), MissingFile(missing), ())]
    return samples


def cam_file_names(samples: Sequence[Sample]) -> list[Path]:
    """Return a relative file name for the activation map of each sample; no two are equal.

    It is the image's path below the folder that all images have in common, such as ``cat/1.cam.png``. Where ``1.jpg`` and
    ``1.png`` lie in one folder, the second is numbered.
    """
    paths = [Path(os.path.abspath(sample.id)) for sample in samples]
    common = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    found: dict[Path, None] = {}
    for path in paths:
        inside = path.relative_to(common)
        names = (inside.with_name(f"{inside.stem}{number}.cam.png") for number in itertools.chain([""], itertools.count(-2, -1)))
        found[next(name for name in names if name not in found)] = None
    return list(found)


def _decode(predictor: Predictor, sample: Sample) -> tuple[Sample, NDArray[np.uint8]] | UnreadableSample:
    """Read and preprocess one sample, in a background thread."""
    try:
        data = sample.file.read()
        return sample.with_sha256(hashlib.sha256(data).hexdigest()), predictor.manifest.preprocess.load(data)
    except ImageError as error:
        return UnreadableSample(sample, error)


def _predict_batch(
    predictor: Predictor, waiting: Sequence[tuple[Sample, NDArray[np.uint8]] | UnreadableSample]
) -> Iterator[SamplePrediction | UnreadableSample]:
    readable = [entry for entry in waiting if not isinstance(entry, UnreadableSample)]
    if readable:
        outputs = predictor.run(np.stack([image for _, image in readable]))
    row = 0
    for entry in waiting:
        if isinstance(entry, UnreadableSample):
            yield entry
            continue
        sample, image = entry
        cam = None if outputs.cam is None else outputs.cam[row]
        yield SamplePrediction(sample, image, outputs.probs[row], outputs.logits[row], outputs.embedding[row], cam)
        row += 1
