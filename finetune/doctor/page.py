"""Write the findings as a self-contained page with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune.bundle.image import decode_image
from finetune.bundle.preprocess import Preprocess
from finetune.data.dataset import Dataset, Sample, targets_of
from finetune.doctor.finding import Case, Examination, Finding
from finetune.errors import ImageError
from finetune.messages import plural
from finetune.report.pictures import THUMBNAIL_PX, data_uri, thumbnail
from finetune.report.templates import render
from finetune.storage.files import write_atomic
from finetune.tasks import task_of

SHOWN_CASES = 30
SHOWN_OF_A_CASE = 4
SEEN_IMAGES = 12


@dataclass(frozen=True)
class _Picture:
    uri: str
    file: str
    label: str


def write_page(path: Path, examination: Examination, dataset: Dataset, preprocess: Preprocess, command: str) -> None:
    """Write the page.

    Args:
        command: the command that examined the data, for the commands shown on the page.
    """
    pictures = _Pictures(dataset)
    text = render(
        "doctor.html",
        title=f"Examination of {dataset.name}",
        examination=examination,
        root=dataset.root,
        counts=f"{plural(examination.n_images, 'image')}, {plural(len(examination.classes), _noun(dataset))}",
        findings=[_shown(finding, pictures) for finding in examination.findings],
        seen=_seen(dataset, preprocess),
        command=command,
    )
    write_atomic(path, lambda stream: stream.write(text.encode("utf-8", "backslashreplace")))


def _noun(dataset: Dataset) -> str:
    return task_of(targets_of(dataset.samples)).noun


def _shown(finding: Finding, pictures: _Pictures) -> dict[str, Any]:
    cases = [_case(case, pictures) for case in finding.cases[:SHOWN_CASES]]
    return {
        "finding": finding,
        "cases": [case for case in cases if case["pictures"]],
        "texts": [case["said"] for case in cases if not case["pictures"] and case["said"]],
        "left": finding.count - len(cases) if finding.cases else 0,
    }


def _case(case: Case, pictures: _Pictures) -> dict[str, Any]:
    found = [picture for one in case.ids[:SHOWN_OF_A_CASE] if (picture := pictures.of(one)) is not None]
    return {"pictures": found, "said": case.said or " ".join(case.ids), "suggested": case.suggested, "key": case.key}


class _Pictures:
    """Thumbnails of samples, each computed once."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.samples: Mapping[str, Sample] = {sample.id: sample for sample in dataset.samples}
        self.made: dict[str, _Picture] = {}

    def of(self, one: str) -> _Picture | None:
        sample = self.samples.get(one)
        if sample is None:
            return None
        if one not in self.made:
            try:
                image = sample.decode(partial(decode_image, short_side_px=THUMBNAIL_PX))
            except ImageError:
                return None
            self.made[one] = _Picture(data_uri(thumbnail(image), "image/jpeg"), one, self.dataset.label_text(sample))
        return self.made[one]


def _seen(dataset: Dataset, preprocess: Preprocess) -> Sequence[_Picture]:
    """Return the first image of each class, up to a limit, as preprocessed for the model."""
    first: dict[int, Sample] = {}
    for sample in dataset.samples:
        for label in sample.labels[:1]:
            first.setdefault(label, sample)
    found = []
    for sample in list(first.values())[:SEEN_IMAGES]:
        try:
            image = sample.decode(preprocess.load)
        except ImageError:
            continue
        found.append(_Picture(data_uri(thumbnail(image), "image/jpeg"), sample.id, dataset.label_text(sample)))
    return found
