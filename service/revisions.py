"""Make a corrected copy of an upload: change labels, leave out images, rename classes. The original is not changed.

The copy has its own names for the same stored files (`finetune.data.contents`), so that it uses hardly any disk space.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from pydantic import Field

from finetune.data.contents import link_files
from finetune.data.dataset import Dataset, Sample
from finetune.data.files import StoredFile
from finetune.data.intake import Intake, describe
from finetune.data.names import class_name, problem_of_class_name
from finetune.data.places.tree import is_system
from finetune.errors import Conflict, DataError, InvalidInput, Problem
from finetune.jobs.files import UploadedFile
from finetune.storage.files import folder_bytes
from service.pictures import Pictures
from service.schemas.body import RequestBody
from service.uploads import Received

MAX_LABEL = 200  # characters
MAY_HOLD = (
    f"a class name has 1 to {MAX_LABEL} characters: no slash, no backslash, no control or direction character, "
    "and no dot at its beginning"
)
Label = Annotated[str, Field(description=f"The name of a class: {MAY_HOLD.partition(': ')[2]}.")]


class Corrections(RequestBody):
    """The corrections of a copy. Images and classes that are not listed are unchanged."""

    labels: dict[str, Label | None] = Field(
        default={}, max_length=10_000, description="Image id → its class, or null to leave the image out."
    )
    renamed: dict[str, Label] = Field(default={}, max_length=1000, description="Class → its new name, for all of its images.")


def write_corrected(pictures: Pictures, original: UploadedFile, wanted: Corrections, contents: Path) -> Received:
    """Write a corrected copy into the folder `contents` and return its description.

    Raises:
        InvalidInput: the dataset does not have an image or a class, or there are no corrections.
        Conflict: the copy would lose what a table says of its images.
        DataError: the copy could not be trained on.
    """
    dataset = pictures.dataset
    if (why := why_not_correctable(dataset)) is not None:
        raise Conflict(why)
    problems = [Problem(f"labels.{one}", "there is no such image") for one in wanted.labels if one not in pictures.samples]
    problems += [Problem(f"renamed.{one}", "there is no such class") for one in wanted.renamed if one not in dataset.classes]
    if not wanted.labels and not wanted.renamed:
        problems.append(Problem("labels", "nothing is changed"))
    problems += [
        Problem(f"{field}.{one}", f"{label[:MAX_LABEL]!r} {why}")
        for field, given in (("labels", wanted.labels), ("renamed", wanted.renamed))
        for one, label in given.items()
        if label is not None and (why := _why_no_label(label)) is not None
    ]
    if problems:
        raise InvalidInput("; ".join(map(str, problems[:5])), problems[:100])
    members: dict[str, Path] = {}
    expected: Counter[str] = Counter()
    for sample in dataset.samples:
        folder = _place(sample, pictures, wanted)
        if folder is not None:
            assert isinstance(sample.file, StoredFile)
            expected[_composed(folder.removeprefix(f"{sample.split}/") if sample.split else folder)] += 1
            members[_unused(f"{folder}/{sample.id.rpartition('/')[2]}", members)] = sample.file.path
    if not members:
        raise InvalidInput("no image is left", [Problem("labels", "leave out every image")])
    n_bytes = link_files(members.items(), contents)
    try:
        described = describe(contents)
    except DataError as error:
        field = "labels" if wanted.labels else "renamed"
        problems = [Problem(field, _told(one, contents)) for one in error.problems]
        raise DataError(_shown(error.message, contents), problems) from None
    _check_that_all_are_there(expected, described, wanted)
    listing = json.dumps([original.sha256, wanted.model_dump(mode="json")], sort_keys=True)
    kind = str(original.summary["kind"])
    intake = Intake(kind, len(members), n_bytes, described.classes, described.counts(), described.warnings)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    return Received(original.filename, original.purpose, n_bytes, digest, intake, folder_bytes(contents), contents)


def why_not_correctable(dataset: Dataset) -> str | None:
    """Return why a copy in class folders cannot hold everything that is known of the samples; None if it can."""
    if not all(isinstance(sample.file, StoredFile) for sample in dataset.samples):
        return "only uploaded images can be corrected here"
    if not all(isinstance(sample.target, int) for sample in dataset.samples):
        return "images with several labels cannot be corrected here: correct the table, and send it again"
    if any(sample.group is not None or sample.weight != 1.0 for sample in dataset.samples):
        return "the table has groups or weights, which a corrected copy would lose: correct the table, and send it again"
    return None


def _place(sample: Sample, pictures: Pictures, wanted: Corrections) -> str | None:
    """Return the folder of a sample in the copy; None if the sample is left out."""
    labels = pictures.dataset.label_names(sample)
    label = wanted.labels.get(sample.id, wanted.renamed.get(labels[0], labels[0]))
    return None if label is None else f"{sample.split}/{label}" if sample.split else label


def _why_no_label(label: str) -> str | None:
    """Return why a text cannot be the name of a class and of its folder, or None if it can."""
    why = problem_of_class_name(label)
    if why is not None or len(label) > MAX_LABEL or label.startswith(".") or "/" in label or "\\" in label:
        return f"cannot be the name of a class{f': it {why}' if why else ''}; {MAY_HOLD}"
    if is_system(class_name(label).strip()):
        return "cannot be the name of a class: systems and programs create folders of this name, so they are not read"
    return None


def _check_that_all_are_there(expected: Counter[str], described: Dataset, wanted: Corrections) -> None:
    """Check that all images of the copy are read with their intended class.

    Raises:
        InvalidInput: some are not; it lists the labels of these images.
    """
    found = Counter(_composed(name) for sample in described.samples for name in described.label_names(sample))
    lost = {name for name in expected.keys() | found.keys() if expected[name] != found[name]}
    if not lost:
        return
    given = [("labels", one, label) for one, label in wanted.labels.items()]
    given += [("renamed", one, label) for one, label in wanted.renamed.items()]
    problems = [
        Problem(f"{field}.{one}", f"a folder {label!r} is not read as a class here; choose another name")
        for field, one, label in given
        if label is not None and _composed(label) in lost
    ]
    problems = problems or [
        Problem("labels", f"images of {', '.join(sorted(lost))[:200]} would not be read as they are labelled")
    ]
    raise InvalidInput("; ".join(map(str, problems[:5])), problems[:100])


def _composed(name: str) -> str:
    """Return the name of a class in Unicode normal form C, for comparison."""
    return unicodedata.normalize("NFC", class_name(name))


def _told(problem: Problem, contents: Path) -> str:
    """Return a problem of the copy as one sentence, without local paths."""
    where, message = problem.where.removeprefix(str(contents)).strip("/"), _shown(problem.message, contents)
    return f"{where}: {message}" if where else message


def _shown(text: str, contents: Path) -> str:
    """Return the text without the local path of the copy."""
    return text.replace(f"{contents}/", "").replace(str(contents), "the corrected data")


def _unused(name: str, taken: Collection[str]) -> str:
    """Return the name, with a number before its last part if the name is taken."""
    folder, _, last = name.rpartition("/")
    number = 2
    while name in taken:
        name, number = f"{folder}/{number}-{last}", number + 1
    return name
