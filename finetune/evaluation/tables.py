"""Write predictions as CSV or Parquet tables, one row per image, for use in other tools."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.distribution import install_command
from finetune.errors import InvalidInput, MissingExtra
from finetune.evaluation.predictions import Predictions
from finetune.evaluation.predictions import write as write_npz
from finetune.storage.files import write_atomic
from finetune.tasks import task_named

SUFFIXES = (".csv", ".parquet", ".npz")
_ROWS_AT_ONCE = 1024


def write_table(path: Path, predictions: Predictions, temperature: float = 1.0) -> None:
    """Write predictions in the format that the file's suffix names: ``.csv``, ``.parquet``, or ``.npz`` for the complete table.

    The columns are file, sha256, label (where it is known), predicted, probability (of the most probable class), and one column
    ``p(CLASS)`` for each class. Where an image may have several labels, label and predicted are JSON lists of names.

    Args:
        temperature: the model's; its probabilities are those of the logits divided by it.

    Raises:
        InvalidInput: the suffix is none of these.
        MissingExtra: the suffix is ``.parquet`` and pyarrow is not installed.
    """
    suffix = check_ending(path)
    if suffix == ".npz":
        write_npz(path, predictions)
    elif suffix == ".csv":
        write_atomic(path, lambda stream: stream.writelines(csv_lines(predictions, temperature)))
    else:
        _write_parquet(path, predictions, temperature)


def csv_lines(predictions: Predictions, temperature: float = 1.0) -> Iterator[bytes]:
    """Yield the table as CSV text in chunks of some rows, so that the whole text never has to fit into memory."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns_of(predictions), lineterminator="\n")
    writer.writeheader()
    for number, row in enumerate(rows_of(predictions, temperature), 1):
        writer.writerow(row)
        if number % _ROWS_AT_ONCE == 0:
            yield text.getvalue().encode("utf-8", "surrogateescape")
            text.seek(0)
            text.truncate()
    yield text.getvalue().encode("utf-8", "surrogateescape")


def check_ending(path: Path) -> str:
    """Return the path's suffix in lower case.

    Raises:
        InvalidInput: `write_table` cannot write files with this suffix.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidInput(f"{path}: write to a file that ends in {', '.join(SUFFIXES)}")
    return suffix


def columns_of(predictions: Predictions) -> list[str]:
    """Return the column names of the table that `write_table` writes."""
    label = [] if predictions.targets is None else ["label"]
    return ["file", "sha256", *label, "predicted", "probability", *(f"p({name})" for name in predictions.classes)]


def rows_of(predictions: Predictions, temperature: float = 1.0) -> Iterator[dict[str, Any]]:
    """Yield a mapping of column names to values for each image."""
    task = task_named(predictions.task)
    probs = task.probabilities(predictions.logits, temperature)
    classes = predictions.classes
    for row, (file, digest) in enumerate(zip(predictions.ids, predictions.digests(), strict=True)):
        best = int(task.ranking(probs[row])[0])
        known = predictions.targets is not None
        label = {"label": task.cell_text(task.labels_of(predictions.labels[row]), classes)} if known else {}
        thresholds = None
        if predictions.thresholds is not None:
            thresholds = task.probability_thresholds(predictions.thresholds[row], temperature)
        yield {
            "file": file,
            "sha256": digest,
            **label,
            "predicted": task.cell_text([int(label) for label in task.predict_labels(probs[row], thresholds)], classes),
            "probability": round(float(probs[row, best]), 6),
            **{f"p({name})": round(float(value), 6) for name, value in zip(classes, probs[row], strict=True)},
        }


def _write_parquet(path: Path, predictions: Predictions, temperature: float) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise MissingExtra(f"Parquet needs pyarrow: {install_command('train')}, or write a .csv file") from None
    columns = columns_of(predictions)

    def write(stream: Any) -> None:
        writer = None
        for rows in _blocks(rows_of(predictions, temperature)):
            block = pa.Table.from_pylist(rows)
            writer = writer or pq.ParquetWriter(stream, block.schema)
            writer.write_table(block)
        if writer is None:
            writer = pq.ParquetWriter(stream, pa.schema([(name, pa.string()) for name in columns]))
        writer.close()

    write_atomic(path, write)


def _blocks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while block := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        yield block
