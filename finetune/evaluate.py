"""Logits of labelled images from anything that runs an exported graph, and the judgement of a finished bundle. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from finetune.bundle.predictor import Predictor
from finetune.bundle.preprocess import Preprocess
from finetune.data.check import check_images
from finetune.data.dataset import Dataset, Sample
from finetune.data.index import index_dataset
from finetune.data.loader import EvalLoader
from finetune.errors import DataError, InvalidInput, Problem, did_you_mean
from finetune.evaluation.metrics import Evaluation, evaluate_logits
from finetune.progress import Progress, ProgressCallback, silent
from finetune.runtime.cores import available_cores

BATCH_SIZE = 16  # where ONNX Runtime is fastest on a CPU

Scorer = Callable[[np.ndarray], np.ndarray]  # images (B, h, w, 3) uint8 -> logits (B, C) float32


def score(
    scorer: Scorer, samples: Sequence[Sample], preprocess: Preprocess, *, what: str, progress: ProgressCallback = silent
) -> np.ndarray:
    """(N, C) float32 logits of `samples` in their order; `what` is said beside the progress."""
    parts, done = [], 0
    for batch in EvalLoader(samples, preprocess, BATCH_SIZE, available_cores()):
        parts.append(scorer(batch.images))
        done += len(batch.labels)
        progress(Progress("evaluating", done, len(samples), "images", message=f"evaluating {what}"))
    return np.concatenate(parts)


def labels_of(samples: Sequence[Sample]) -> np.ndarray:
    """(N,) int64"""
    return np.array([sample.target for sample in samples], dtype=np.int64)


def evaluate_bundle(folder: Path, data: Path, split: str | None = None, progress: ProgressCallback = silent) -> Evaluation:
    """Measure the bundle in `folder` on the labelled images under `data`; classes are matched by name.

    `split` chooses among train, val and test folders inside `data`; by default test, else val, else everything.

    Raises:
        DataError: no such split, or classes that the bundle does not know.
    """
    predictor = Predictor.load(folder, threads=available_cores())
    dataset = check_images(index_dataset(data), progress=progress)
    samples = _relabelled(dataset, _chosen(dataset, split), predictor.manifest.classes)
    logits = score(
        lambda images: predictor.run(images).logits, samples, predictor.manifest.preprocess, what=data.name, progress=progress
    )
    return evaluate_logits(logits, labels_of(samples), predictor.manifest.classes)


def _chosen(dataset: Dataset, split: str | None) -> Sequence[Sample]:
    present = [name for name in ("test", "val", "train") if dataset.of(name)]
    if split is None:
        return dataset.of(present[0]) if present else dataset.samples
    if split not in present:
        found = f"it has {', '.join(present)}" if present else "it has no train, val or test folders inside; leave --split out"
        raise InvalidInput(f"{dataset.root} has no split {split!r}: {found}")
    return dataset.of(split)


def _relabelled(dataset: Dataset, samples: Sequence[Sample], classes: Sequence[str]) -> Sequence[Sample]:
    """`samples` with labels counted in the bundle's classes."""
    position = {name: label for label, name in enumerate(classes)}
    named = sorted({name for sample in samples for name in dataset.label_names(sample)})
    unknown = [name for name in named if name not in position]
    if unknown:
        problems = [Problem(name, f"not a class of this model.{did_you_mean(name, classes)}") for name in unknown]
        raise DataError(f"{dataset.root}: the model knows {', '.join(classes)}", problems)
    of_bundle = [position.get(name, -1) for name in dataset.classes]
    return [replace(sample, target=of_bundle[sample.labels[0]]) for sample in samples]
