"""The examination of any number of labels per image: labels that are wrong, and labels that are missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from finetune.doctor.examined_data import ExaminedData
from finetune.doctor.finding import Finding
from finetune.doctor.labels import doubt_label_sets
from finetune.doctor.looks import Look
from finetune.messages import plural
from finetune.training.label_doubts import label_changes, with_changes


def multilabel_findings(data: ExaminedData, looks: Mapping[str, Look]) -> Iterator[Finding]:
    """Yield the findings about the labels of each image; what the images look like has no part in them."""
    with data.timed("labels"):
        yield from _wrong_labels(data)


def _wrong_labels(data: ExaminedData) -> Iterator[Finding]:
    doubts = doubt_label_sets(data.samples, data.embeddings, len(data.dataset.classes))
    if doubts is None:
        return
    data.confidence = tuple(round(float(one), 6) for one in doubts.confidence)
    if not doubts.doubted:
        return
    n_labels = sum(len(one.wrong) + len(one.missing) for one in doubts.doubted)
    yield Finding(
        "label_errors",
        "doubt",
        "Labels that are probably wrong",
        len(doubts.doubted),
        f"Of {plural(len(data.samples), 'image')}, {len(doubts.doubted):,} have labels ({n_labels:,} in all) that are "
        "doubted by linear heads on frozen features without the image. A doubt is no proof: look at the first ones.",
        "Correct the labels in the manifest, or acknowledge the case.",
        tuple(
            data.case(
                "label_errors",
                [one.row],
                round(1 - one.own_score, 4),
                f"labelled {data.label_text(one.row) or 'with nothing'}; {label_changes(data.dataset, one.wrong, one.missing)}",
                data.dataset.label_text(with_changes(data.samples[one.row], one.wrong, one.missing)),
            )
            for one in doubts.doubted
        ),
    )
