"""Record the labels that the frozen features of a run contradict. They are only reported: nothing is refused or changed.

Where a head is solved the features are known, so no image is decoded. `finetune check` tests more thoroughly and finds more.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from numpy.typing import NDArray

from finetune.data.dataset import Dataset, Sample, targets_of
from finetune.events import DataWarning
from finetune.features.left_out import Features, doubted_label_sets, doubted_labels
from finetune.messages import natural_list, plural, printable
from finetune.storage.files import write_atomic
from finetune.storage.rundir import RunDir
from finetune.tasks import task_of

COLUMNS = ("path", "split", "label", "suggested", "score", "doubt")
SHOWN = 3


def record_label_doubts(run: RunDir, dataset: Dataset, parts: Sequence[tuple[Sequence[Sample], Features]]) -> None:
    """Write the labels that are probably wrong into the run folder, and record how many there are as an event.

    The runs of a study have the same images, so only the first one computes the table.

    Args:
        parts: samples with their features (n, D), of which view 0 is that of evaluation.
    """
    table = run.outermost.label_doubts
    samples = [sample for of_part, _ in parts for sample in of_part]
    if table.exists():
        return
    task = task_of(targets_of(samples))
    targets = task.encode(targets_of(samples), len(dataset.classes))
    doubted = LABEL_DOUBTS[task.name](dataset, samples, targets, [part for _, part in parts])
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    rows.writerows(doubted)
    write_atomic(table, lambda stream: stream.write(text.getvalue().encode("utf-8", "surrogateescape")))
    for sentence in label_doubts_sentence(run):
        run.record(DataWarning(sentence))


class LabelDoubts(Protocol):
    """Yields the rows of the table for one task."""

    def __call__(
        self, dataset: Dataset, samples: Sequence[Sample], targets: NDArray[Any], features: Sequence[Features], /
    ) -> Iterator[tuple[str, ...]]:
        """Yield a row of `COLUMNS` for each image with doubted labels.

        Args:
            targets: of the samples, as the task encodes them.
            features: (n, D) of consecutive parts of the samples.
        """
        ...


def _doubted_labels(
    dataset: Dataset, samples: Sequence[Sample], targets: NDArray[Any], features: Sequence[Features]
) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table for images that have exactly one label each."""
    for doubt in doubted_labels(features, targets, len(dataset.classes)):
        sample, suggested = samples[doubt.row], dataset.classes[doubt.suggested]
        label = dataset.label_text(sample)
        yield (*_place(sample), label, suggested, f"{doubt.own_score:.4f}", f"is {label}, rather {suggested}")


def _doubted_label_sets(
    dataset: Dataset, samples: Sequence[Sample], targets: NDArray[Any], features: Sequence[Features]
) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table for images with any number of labels."""
    for doubt in doubted_label_sets(features, targets):
        sample = samples[doubt.row]
        corrected = with_changes(sample, doubt.wrong, doubt.missing)
        said = label_changes(dataset, doubt.wrong, doubt.missing)
        yield (*_place(sample), dataset.label_text(sample), dataset.label_text(corrected), f"{doubt.own_score:.4f}", said)


LABEL_DOUBTS: Mapping[str, LabelDoubts] = {"multiclass": _doubted_labels, "multilabel": _doubted_label_sets}
"""What doubts the labels of each task, by the task's name; every task in `finetune.tasks` has one."""


def label_changes(dataset: Dataset, wrong: Sequence[int], missing: Sequence[int]) -> str:
    """Return a phrase with the labels that an image probably has wrongly, and those that it probably lacks."""
    parts = [("is probably not", wrong), ("is probably also", missing)]
    return " and ".join(f"{what} {natural_list([dataset.classes[one] for one in labels])}" for what, labels in parts if labels)


def with_changes(sample: Sample, wrong: Sequence[int], missing: Sequence[int]) -> Sample:
    """Return the sample without the labels that are probably wrong, and with those that it probably lacks."""
    return replace(sample, target=tuple(sorted({*sample.labels, *missing} - set(wrong))))


def _place(sample: Sample) -> tuple[str, str]:
    return sample.id, sample.split or ""


def label_doubts_sentence(run: RunDir) -> tuple[str, ...]:
    """Return in at most one sentence which labels of a run's data were doubted."""
    table = run.outermost.label_doubts
    if not table.exists():
        return ()
    text = table.read_bytes().decode("utf-8", "surrogateescape")
    found = list(csv.DictReader(io.StringIO(text, newline="")))
    if not found:
        return ()
    shown = "; ".join(f"{printable(one['path'])} {one['doubt']}" for one in found[:SHOWN])
    more = f"; and {len(found) - SHOWN:,} more in measurements/{table.name}" if len(found) > SHOWN else ""
    images = f"{plural(len(found), 'image')} ({shown}{more})"
    return (f"Labels that are probably wrong: {images}. finetune check shows them, and tests more thoroughly",)
