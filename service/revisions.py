"""A corrected copy of an upload: images with other labels, without some, or with classes renamed. The original stays as it is.

The copy holds the same files under names of its own (`finetune.data.contents`), so that it takes hardly any space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from finetune.data.contents import hold_again
from finetune.data.dataset import Sample
from finetune.data.files import StoredFile
from finetune.data.intake import Intake, describe
from finetune.errors import DataError, InvalidInput, NotFound, Problem
from finetune.jobs.files import UploadedFile
from finetune.jobs.worker import folder_bytes
from service.pictures import Pictures
from service.uploads import Received

Label = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]*$")]


class Corrections(BaseModel):
    """What a corrected copy has otherwise. What is not named stays."""

    model_config = ConfigDict(extra="forbid")

    labels: dict[str, Label | None] = Field(
        default={}, max_length=10_000, description="Image id → its class, or null to leave the image out."
    )
    renamed: dict[str, Label] = Field(default={}, max_length=1000, description="Class → its new name, for all of its images.")


def write_corrected(pictures: Pictures, original: UploadedFile, wanted: Corrections, contents: Path) -> Received:
    """Write a corrected copy into the folder `contents` and describe it.

    Raises:
        InvalidInput: an image or a class that the dataset does not have, labels that cannot be changed, or nothing to change.
        DataError: what is left cannot be trained on.
    """
    dataset = pictures.dataset
    problems = [Problem(f"labels.{one}", "there is no such image") for one in wanted.labels if one not in pictures.samples]
    problems += [Problem(f"renamed.{one}", "there is no such class") for one in wanted.renamed if one not in dataset.classes]
    if not wanted.labels and not wanted.renamed:
        problems.append(Problem("labels", "nothing is changed"))
    if problems:
        raise InvalidInput("; ".join(map(str, problems[:5])), problems[:100])
    members: dict[str, Path] = {}
    for sample in dataset.samples:
        folder = _place(sample, pictures, wanted)
        if folder is not None:
            assert isinstance(sample.file, StoredFile)
            members[_unused(f"{folder}/{sample.id.rpartition('/')[2]}", members)] = sample.file.path
    if not members:
        raise InvalidInput("no image is left", [Problem("labels", "leave out every image")])
    n_bytes = hold_again(members.items(), contents)
    try:
        described = describe(contents)
    except DataError as error:
        problems = [Problem(_shown(one.where, contents), _shown(one.message, contents)) for one in error.problems]
        raise DataError(_shown(error.message, contents), problems) from None
    listing = json.dumps([original.sha256, wanted.model_dump(mode="json")], sort_keys=True)
    kind = str(original.summary["kind"])
    intake = Intake(kind, len(members), n_bytes, described.classes, described.counts(), described.warnings)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    return Received(original.filename, original.purpose, n_bytes, digest, intake, folder_bytes(contents), contents)


def _place(sample: Sample, pictures: Pictures, wanted: Corrections) -> str | None:
    """Return the folder of a sample in the copy, None where it is left out."""
    labels = pictures.dataset.label_names(sample)
    if len(labels) != 1 or not isinstance(sample.file, StoredFile):
        raise NotFound("Only uploaded images in class folders can be corrected here")
    label = wanted.labels.get(sample.id, wanted.renamed.get(labels[0], labels[0]))
    return None if label is None else f"{sample.split}/{label}" if sample.split else label


def _shown(text: str, contents: Path) -> str:
    """Return a text without where on this machine the copy lies."""
    return text.replace(f"{contents}/", "").replace(str(contents), "the corrected data")


def _unused(name: str, taken: Collection[str]) -> str:
    """Return the name with a number before its last part, if it is taken."""
    folder, _, last = name.rpartition("/")
    number = 2
    while name in taken:
        name, number = f"{folder}/{number}-{last}", number + 1
    return name
