"""Note the labels that the frozen features of a run contradict. A note alone: nothing is refused, and no figure depends on it.

The features are at hand where a head is solved, so this takes no decoding. `finetune check` looks closer, and names more.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import numpy as np

from finetune.data.dataset import Dataset, Sample
from finetune.events import DataWarning
from finetune.features.left_out import Features, doubted_labels
from finetune.messages import plural, printable
from finetune.storage.files import write_atomic
from finetune.storage.rundir import RunDir

COLUMNS = ("path", "split", "label", "suggested", "score")
SHOWN = 3


def note_label_doubts(run: RunDir, dataset: Dataset, parts: Sequence[tuple[Sequence[Sample], Features]]) -> None:
    """Write the labels that are probably wrong into the run folder, and record how many there are as an event.

    Runs of one study have the same images: the first of them writes the table of all.

    Args:
        parts: samples with their features (n, D), of which view 0 is that of evaluation.
    """
    table = run.outermost.label_doubts
    samples = [sample for of_part, _ in parts for sample in of_part]
    if table.exists() or not all(isinstance(sample.target, int) for sample in samples):
        return
    labels = np.array([sample.labels[0] for sample in samples], np.int64)
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for doubt in doubted_labels([features for _, features in parts], labels, len(dataset.classes)):
        sample = samples[doubt.row]
        rows.writerow(
            (sample.id, sample.split, dataset.label_text(sample), dataset.classes[doubt.suggested], f"{doubt.own_score:.4f}")
        )
    write_atomic(table, lambda stream: stream.write(text.getvalue().encode("utf-8", "surrogateescape")))
    for sentence in label_doubts_noted(run):
        run.record(DataWarning(sentence))


def label_doubts_noted(run: RunDir) -> tuple[str, ...]:
    """Return in at most one sentence which labels of a run's data were doubted."""
    table = run.outermost.label_doubts
    if not table.exists():
        return ()
    text = table.read_bytes().decode("utf-8", "surrogateescape")
    found = list(csv.DictReader(io.StringIO(text, newline="")))
    if not found:
        return ()
    shown = "; ".join(f"{printable(one['path'])} is {one['label']}, rather {one['suggested']}" for one in found[:SHOWN])
    more = f"; and {len(found) - SHOWN:,} more in measurements/{table.name}" if len(found) > SHOWN else ""
    images = f"{plural(len(found), 'image')} ({shown}{more})"
    return (f"Labels that are probably wrong: {images}. finetune check shows them, and looks closer",)
