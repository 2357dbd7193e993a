"""The table of a model's predictions on one split. Every run writes such tables, and all metrics are computed from them.

A table is one ``.npz`` file of plain arrays, which NumPy alone reads (no pickle):

    logits      (N, C) float32   the model's outputs before softmax or sigmoid and before any temperature
    targets     (N,) int64 class indices; with several labels per image (N, C) uint8, 1 where the label applies;
                absent where the images are not labelled
    thresholds  (N, C) float32   the least logit with which a label is given; absent where labels exclude each other
    sha256      (N, 32) uint8    of each image file's bytes; zeros where it is not known
    embedding   (N, D) float32   the pooled features, input of the head's linear layer; absent where they were not computed
    header      (L,) uint8       JSON text: schema_version, split, task, classes (in the order of the logits), ids (one a row),
                                 columns (the names of the other arrays)

The rows are in the order of the split's samples. ``finetune.evaluation.predictions.read(path)`` returns all of it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import InvalidInput
from finetune.storage.files import json_text, write_atomic
from finetune.tasks import task_named
from finetune.tasks.task import ImageResults

SCHEMA_VERSION = 1
SHA256_BYTES = 32
COLUMNS = ("sha256", "targets", "logits", "embedding", "thresholds")


@dataclass(frozen=True)
class Predictions:
    """A model's predictions on one split, one row per image."""

    split: str
    task: str  # multiclass, multilabel
    classes: tuple[str, ...]  # in the order of the logits
    ids: tuple[str, ...]  # of the samples: paths as given, relative to the dataset
    sha256: NDArray[np.uint8]  # (N, 32)
    targets: NDArray[Any] | None  # (N,) int64, or (N, C) uint8; None where the images are not labelled
    logits: NDArray[np.float32]  # (N, C)
    embedding: NDArray[np.float32] | None = None  # (N, D)
    thresholds: NDArray[np.float32] | None = None  # (N, C) least logits; None: a label is given if its probability exceeds 1/2

    def __post_init__(self) -> None:
        n, n_classes = len(self.ids), len(self.classes)
        n_targets, n_embeddings = (n if column is None else len(column) for column in (self.targets, self.embedding))
        of_thresholds = self.logits.shape if self.thresholds is None else self.thresholds.shape
        shapes = self.logits.shape, self.sha256.shape, n_targets, n_embeddings, of_thresholds
        if shapes != ((n, n_classes), (n, SHA256_BYTES), n, n, (n, n_classes)):
            raise InvalidInput(
                f"predictions of {n} images and {n_classes} classes do not fit logits of shape {self.logits.shape}, "
                f"{n_targets} targets, {n_embeddings} embeddings, thresholds of shape {of_thresholds} and digests of shape "
                f"{self.sha256.shape}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.integer] | Sequence[int]) -> Predictions:
        """Return a table of the rows with these indices, in the order given."""
        chosen = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            ids=tuple(self.ids[row] for row in chosen),
            sha256=self.sha256[chosen],
            targets=None if self.targets is None else self.targets[chosen],
            logits=self.logits[chosen],
            embedding=None if self.embedding is None else self.embedding[chosen],
            thresholds=None if self.thresholds is None else self.thresholds[chosen],
        )

    def with_thresholds(self, thresholds: NDArray[np.floating[Any]] | None) -> Predictions:
        """Return the table with these thresholds: (C,) for all images, (N, C) for each image, or None for the default."""
        if thresholds is None:
            return replace(self, thresholds=None)
        return replace(self, thresholds=np.broadcast_to(np.asarray(thresholds, np.float32), self.logits.shape))

    def image_results(self) -> ImageResults:
        """Compare the predictions with the labels, image by image, by the rules of the task.

        Raises:
            InvalidInput: the images are not labelled, or the table is empty.
            TrainingError: a logit is NaN or infinite.
        """
        return task_named(self.task).image_results(self.logits, self.labels, self.thresholds)

    @property
    def labels(self) -> NDArray[Any]:
        """The targets, or an error if there are none.

        Raises:
            InvalidInput: the images are not labelled.
        """
        if self.targets is None:
            raise InvalidInput("these predictions have no labels to be compared with; use finetune evaluate on labelled images")
        return self.targets

    def digests(self) -> list[str]:
        """Return the sha256 of each image's bytes as hexadecimal text."""
        return [row.tobytes().hex() for row in self.sha256]


def digests_as_rows(digests: Sequence[str]) -> NDArray[np.uint8]:
    """Return hexadecimal sha256 texts as (N, 32) bytes; an empty text becomes zeros."""
    joined = b"".join(bytes.fromhex(digest) if digest else bytes(SHA256_BYTES) for digest in digests)
    return np.frombuffer(joined, np.uint8).reshape(-1, SHA256_BYTES)


def concatenate(parts: Sequence[Predictions], split: str) -> Predictions:
    """Return the rows of all `parts` as one table, named `split`.

    Raises:
        InvalidInput: there is no part, or the parts differ in classes or task.
    """
    if not parts or any(part.classes != parts[0].classes or part.task != parts[0].task for part in parts):
        raise InvalidInput("only predictions of the same task and classes can be put together, and at least one table is needed")
    with_embeddings = all(part.embedding is not None for part in parts)
    with_thresholds = any(part.thresholds is not None for part in parts)
    return Predictions(
        split=split,
        task=parts[0].task,
        classes=parts[0].classes,
        ids=tuple(sample for part in parts for sample in part.ids),
        sha256=np.concatenate([part.sha256 for part in parts]),
        targets=np.concatenate([part.labels for part in parts]),
        logits=np.concatenate([part.logits for part in parts]),
        embedding=np.concatenate([part.embedding for part in parts if part.embedding is not None]) if with_embeddings else None,
        thresholds=np.concatenate([_thresholds(part) for part in parts]) if with_thresholds else None,
    )


def _thresholds(table: Predictions) -> NDArray[np.float32]:
    return np.zeros_like(table.logits) if table.thresholds is None else table.thresholds


def write(path: Path, predictions: Predictions) -> None:
    """Write the table as one ``.npz`` file, atomically."""
    columns = {name: array for name in COLUMNS if (array := getattr(predictions, name)) is not None}
    header = {
        "schema_version": SCHEMA_VERSION,
        "split": predictions.split,
        "task": predictions.task,
        "classes": list(predictions.classes),
        "ids": list(predictions.ids),
        "columns": list(columns),
    }
    text = np.frombuffer(json_text(header).encode(), np.uint8)
    write_atomic(path, lambda stream: np.savez(stream, allow_pickle=False, header=text, **columns))


def read(path: Path) -> Predictions:
    """Read a table that `write` wrote.

    Raises:
        InvalidInput: the file does not exist, or is not a table of predictions in a schema version that this code reads.
    """
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
            version = header["schema_version"]
            if version != SCHEMA_VERSION:
                raise InvalidInput(f"predictions of schema version {version}, this version reads {SCHEMA_VERSION}")
            if set(arrays.files) != {"header", *header["columns"]}:
                raise InvalidInput(
                    f"it holds {', '.join(arrays.files)} where {', '.join(header['columns'])} are listed in the header"
                )
            columns = {name: arrays[name] for name in header["columns"]}
        classes, ids = tuple(header["classes"]), tuple(header["ids"])
        return Predictions(header["split"], header["task"], classes, ids, **{"targets": None, **columns})
    except InvalidInput as error:
        raise InvalidInput(f"{path}: not a table of predictions: {error.message}") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        raise InvalidInput(f"{path}: not a table of predictions ({error})") from None


def problem_of_table(path: Path, task: str, classes: Sequence[str]) -> str:
    """Return why a file is not a table of a model's predictions, as the end of a sentence; an empty text if it is one.

    Args:
        task: of the model.
        classes: of the model.
    """
    try:
        found = read(path)
    except InvalidInput as error:
        return f"is {error.message.removeprefix(f'{path}: ')}"
    if (found.task, found.classes) != (task, tuple(classes)):
        return "has the predictions of a model with other classes"
    return ""
