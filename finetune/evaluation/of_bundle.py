"""Evaluate a bundle on labelled images, and count how many of them it was trained on. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.bundle.predictor import Predictor, Seen, read_seen
from finetune.data.dataset import Dataset, Sample
from finetune.data.index import index_dataset
from finetune.data.reading import Reading
from finetune.errors import DataError, InvalidInput, Problem, did_you_mean
from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.evaluation.predict import SamplePrediction, UnreadableSample, predict_samples, predictions_table
from finetune.evaluation.predictions import Predictions
from finetune.messages import printable
from finetune.progress import ProgressCallback, silent
from finetune.runtime.cores import available_cores


@dataclass(frozen=True)
class BundleEvaluation:
    """The evaluation of a bundle on a data set, and how much of that set it was trained on."""

    model: str  # ``name@version``; only the name of a bundle that is not registered
    evaluation: Evaluation
    predictions: Predictions
    n_trained_on: int | None  # images, compared by sha256, that the weights were fitted on; None: the bundle does not record it
    n_chosen_on: int | None  # other images that were only used for validation, to choose between weights
    unseen: Evaluation | None  # on the images that are neither; None if there are none, or if it would equal `evaluation`
    unreadable: tuple[UnreadableSample, ...]
    temperature: float  # the bundle's; its probabilities are those of the logits divided by it

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as JSON values."""
        return {
            "model": self.model,
            **self.evaluation.to_json(),
            "n_trained_on": self.n_trained_on,
            "n_chosen_on": self.n_chosen_on,
            "unseen": self.unseen.to_json() if self.unseen else None,
            "unreadable": [{"file": bad.sample.id, "reason": bad.error.message} for bad in self.unreadable],
        }


def evaluate_bundle(
    folder: Path,
    data: Path | str,
    split: str | None = None,
    progress: ProgressCallback = silent,
    reading: Reading | None = None,
) -> BundleEvaluation:
    """Evaluate the bundle in `folder` on the labelled images in `data`; classes are matched by name.

    Args:
        data: a folder, an archive, a table or a URI, as for training.
        split: train, val or test inside `data`; by default test if present, else val, else all images.

    Raises:
        InvalidInput: `data` has no such split.
        DataError: there is no readable image, or there are classes that the bundle does not know.
    """
    predictor = Predictor.load(folder, threads=available_cores())
    dataset = index_dataset(data, for_training=False, reading=reading)
    samples = _relabelled(dataset, _chosen(dataset, split), predictor.manifest.classes)
    predicted: list[SamplePrediction] = []
    unreadable: list[UnreadableSample] = []
    for prediction in predict_samples(predictor, samples, what=dataset.name, progress=progress):
        predicted.append(prediction) if isinstance(prediction, SamplePrediction) else unreadable.append(prediction)
    if not predicted:
        problems = [Problem(bad.sample.id, bad.error.message) for bad in unreadable[:10]]
        raise DataError(f"{printable(data)}: holds no image that can be read", problems)
    predictions = predictions_table(predicted, predictor, split or "given", labelled=True)
    seen = read_seen(folder)
    known, digests = seen or Seen(), predictions.digests()
    trained_on = np.array([known.trained_on(digest) for digest in digests])
    chosen_on = np.array([known.chosen_on(digest) for digest in digests]) & ~trained_on
    unseen_rows = np.flatnonzero(~(trained_on | chosen_on))
    partly = 0 < len(unseen_rows) < len(predictions)
    return BundleEvaluation(
        model=predictor.manifest.reference,
        evaluation=evaluate(predictions),
        predictions=predictions,
        n_trained_on=None if seen is None else int(trained_on.sum()),
        n_chosen_on=None if seen is None else int(chosen_on.sum()),
        unseen=evaluate(predictions.take(unseen_rows)) if partly else None,
        unreadable=tuple(unreadable),
        temperature=float(predictor.manifest.calibration.get("temperature", 1.0)),
    )


def _chosen(dataset: Dataset, split: str | None) -> Sequence[Sample]:
    present = [name for name in ("test", "val", "train") if dataset.of(name)]
    if split is None:
        return dataset.of(present[0]) if present else dataset.samples
    if split not in present:
        found = f"it has {', '.join(present)}" if present else "it has no train, val or test folders inside; leave --split out"
        raise InvalidInput(f"{dataset.root} has no split {split!r}: {found}")
    return dataset.of(split)


def _relabelled(dataset: Dataset, samples: Sequence[Sample], classes: Sequence[str]) -> Sequence[Sample]:
    """Return the samples with targets as indices into the bundle's classes instead of the dataset's."""
    position = {name: label for label, name in enumerate(classes)}
    named = sorted({name for sample in samples for name in dataset.label_names(sample)})
    if unknown := [name for name in named if name not in position]:
        problems = [Problem(name, f"not a class of this model.{did_you_mean(name, classes)}") for name in unknown]
        raise DataError(f"{dataset.root}: the model knows {', '.join(classes)}", problems)
    of_bundle = [position.get(name, -1) for name in dataset.classes]
    return [sample.renumbered(of_bundle) for sample in samples]
