"""Write the measurements that only the diagnosis of a run uses into ``measurements/`` of the run folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Dataset, Sample, targets_of
from finetune.evaluation import predictions as tables
from finetune.evaluation.evaluate import POOLED
from finetune.evaluation.predictions import Predictions, digests_as_rows
from finetune.features.neighbours import nearest_training_images
from finetune.storage.files import write_atomic
from finetune.storage.rundir import RunDir
from finetune.tasks import Task
from finetune.training.sample import choose_sample

NEIGHBOURS_COLUMNS = ("split", "path", "label", "nearest", "nearest_label", "ratio")
MOST_HELD_OUT = 2000  # images of a split whose nearest training images are searched

Features = NDArray[np.floating[Any]]


def write_sample_predictions(
    run: RunDir, task: Task, dataset: Dataset, indices: NDArray[np.int64], step: int, logits: NDArray[np.float32]
) -> None:
    """Write the logits (m, C) of the training images at `indices`, computed after `step`, as a table of predictions."""
    train = dataset.of("train")
    chosen = [train[index] for index in indices]
    table = Predictions(
        split="train",
        task=task.name,
        classes=dataset.classes,
        ids=tuple(sample.id for sample in chosen),
        sha256=digests_as_rows([sample.sha256 for sample in chosen]),
        targets=task.encode(targets_of(chosen), len(dataset.classes)),
        logits=logits,
    )
    tables.write(run.train_sample_at(step), table)


def pool_neighbours(run: RunDir, folds: Sequence[RunDir]) -> None:
    """Write the rows of the folds' tables that are of their test images into the study's ``neighbours.csv``, as `POOLED`.

    Args:
        run: the folder of the study.
        folds: of each fold the run whose model was tested.
    """
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(NEIGHBOURS_COLUMNS)
    n_rows = 0
    for table in (fold.neighbours for fold in folds if fold.neighbours.exists()):
        of_fold = csv.reader(io.StringIO(table.read_bytes().decode("utf-8", "surrogateescape"), newline=""))
        tested = [(POOLED, *row[1:]) for row in of_fold if row[0] == "test"]
        rows.writerows(tested)
        n_rows += len(tested)
    if n_rows:
        write_atomic(run.neighbours, lambda stream: stream.write(text.getvalue().encode("utf-8", "surrogateescape")))


def write_neighbours(
    run: RunDir,
    dataset: Dataset,
    train: tuple[Sequence[Sample], Features],
    held_out: Sequence[tuple[Sequence[Sample], Features]],
) -> None:
    """Write the nearest training image of each image of val and test, by their features, as the rows of ``neighbours.csv``.

    Args:
        train, held_out: samples with their features (N, D); `held_out` has one pair per split.
    """
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(NEIGHBOURS_COLUMNS)
    of_train, train_features = train
    for samples, features in held_out:
        chosen = choose_sample(samples, MOST_HELD_OUT)
        found = nearest_training_images(train_features, features[chosen])
        if found is None:
            continue
        for index, nearest, ratio in zip(chosen, found.nearest, found.ratio, strict=True):
            one, other = samples[index], of_train[nearest]
            labels = dataset.label_text(one), dataset.label_text(other)
            rows.writerow((one.split, one.id, labels[0], other.id, labels[1], f"{ratio:.4f}"))
    write_atomic(run.neighbours, lambda stream: stream.write(text.getvalue().encode("utf-8", "surrogateescape")))
