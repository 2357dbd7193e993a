"""The examination of one label per image: wrong labels, labels that can be told without looking, and classes that are two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from finetune.doctor.examined_data import ExaminedData
from finetune.doctor.finding import Case, Finding, case_key
from finetune.doctor.labels import doubt_labels
from finetune.doctor.looks import Look
from finetune.doctor.modes import classes_that_are_two
from finetune.doctor.shortcuts import find_shortcuts
from finetune.messages import natural_list, plural


def multiclass_findings(data: ExaminedData, looks: Mapping[str, Look]) -> Iterator[Finding]:
    """Yield the findings about the labels, about shortcuts to them, and about classes of two groups."""
    with data.timed("labels"):
        yield from _wrong_labels(data)
    with data.timed("shortcuts"):
        yield from _shortcuts(data, looks)
    with data.timed("groups"):
        yield from _groups(data)


def _wrong_labels(data: ExaminedData) -> Iterator[Finding]:
    doubts = doubt_labels(data.samples, data.embeddings, len(data.dataset.classes))
    if doubts is None:
        return
    data.confidence = tuple(round(float(one), 6) for one in doubts.confidence)
    if doubts.why_none:
        yield Finding(
            "labels_not_judged",
            "note",
            "Labels could not be judged",
            1,
            f"A linear head on the features of this backbone {doubts.why_none}, so it says nothing about single labels.",
            "Examine the images with pretrained weights, or with a backbone that suits them.",
        )
    if not doubts.doubted:
        return
    classes = data.dataset.classes
    yield Finding(
        "label_errors",
        "doubt",
        "Labels that are probably wrong",
        len(doubts.doubted),
        f"Of {plural(len(data.samples), 'label')}, {len(doubts.doubted):,} are doubted by a linear head on frozen features "
        "that has not seen the image. A doubt is no proof: look at the first ones.",
        "Correct the label in the manifest, or acknowledge the case.",
        tuple(
            data.case(
                "label_errors",
                [one],
                round(1 - float(doubts.confidence[one]), 4),
                f"labelled {data.label_text(one)} ({doubts.confidence[one]:.1%} likely)",
                classes[doubts.suggested[one]],
            )
            for one in doubts.doubted
        ),
        "relabel",
    )


def _shortcuts(data: ExaminedData, looks: Mapping[str, Look]) -> Iterator[Finding]:
    found = find_shortcuts(data.samples, looks, len(data.dataset.classes))
    if not found:
        return
    classes, chance = data.dataset.classes, 1 / len(data.dataset.classes)
    cases = []
    for one in found:
        told = natural_list([f"{classes[label]} ({share:.0%})" for label, share in one.given_away], 5)
        said = f"{one.fact} alone gives away {told}; right for {one.accuracy:.0%} of a class's images, by chance {chance:.0%}"
        cases.append(Case((), one.given_away[0][1], said, key=case_key("shortcuts", [one.fact, *classes])))
    yield Finding(
        "shortcuts",
        "problem",
        "The label can be told without looking at the picture",
        len(cases),
        f"{natural_list([one.fact for one in found])}: a model may learn this instead of what the pictures show, and fail on "
        "pictures from elsewhere.",
        "Collect every class in the same way, or bring the files to one size, format and compression; test on pictures from "
        "another source.",
        tuple(cases),
    )


def _groups(data: ExaminedData) -> Iterator[Finding]:
    labels = np.array([sample.labels[0] for sample in data.samples], np.int64)
    found = classes_that_are_two(data.embeddings, labels)
    if found:
        names = natural_list([data.dataset.classes[one.label] for one in found])
        yield Finding(
            "two_groups",
            "doubt",
            "Classes that may be two",
            len(found),
            f"{names}: the images fall into two groups that lie farther apart than different images of one kind do here.",
            "Look at the most typical images of each group. Where they are different things, give them different labels.",
            tuple(
                data.case(
                    "two_groups",
                    [*one.first, *one.second],
                    round(one.apart, 2),
                    f"{data.dataset.classes[one.label]}: {1 - one.share:.0%} like the first {len(one.first)}, "
                    f"{one.share:.0%} like the others; {one.apart:.1f} standard deviations apart",
                )
                for one in found
            ),
        )
