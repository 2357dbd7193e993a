"""Correct data by a manifest, without changing files: leave images out, change labels, set groups. Torch-free.

`finetune check DATA --fix FILE` writes the manifest, users edit it in any spreadsheet program, and `data.manifest` applies it.
Its rows are matched to images by the sha256 of their bytes and, among files with the same bytes, by their ids; images without a
row stay as they are.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from finetune.data.dataset import Dataset, Sample
from finetune.errors import DataError, Problem, did_you_mean
from finetune.messages import printable
from finetune.storage.files import write_atomic

COLUMNS = ("file", "label", "use", "group", "why", "suggested", "confidence", "sha256")
_USE: Mapping[str, bool] = {"yes": True, "no": False, "true": True, "false": False, "1": True, "0": False, "": True}


@dataclass(frozen=True)
class Row:
    """The corrections of one image.

    Args:
        use: ``no`` leaves it out.
        why: findings about the image; this and the next two fields have no effect.
        suggested: a label that may be the right one.
        confidence: in the label, of a model that has not seen the image; rows are sorted by it, lowest first.
    """

    file: str
    label: str
    use: str
    group: str
    why: str
    suggested: str
    confidence: str
    sha256: str


def write_corrections(path: Path, rows: Iterable[Row]) -> None:
    """Write a manifest as CSV."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(row) for row in rows)
    write_atomic(path, lambda stream: stream.write(text.getvalue().encode("utf-8", "surrogateescape")))


def corrected(dataset: Dataset, path: Path) -> Dataset:
    """Return a checked dataset with the corrections of a manifest.

    Raises:
        DataError: the file is no manifest, a label is unknown, or a class has no image left; all problems are listed.
    """
    by_content = _by_content(_read(path))
    position = {name: label for label, name in enumerate(dataset.classes)}
    problems: list[Problem] = []
    samples: list[Sample] = []
    n_out = n_other = 0
    for sample in dataset.samples:
        row = _row_of(sample, by_content)
        if row is None:
            samples.append(sample)
        elif not _USE[row.use.strip().casefold()]:
            n_out += 1
        else:
            changed = replace(sample, group=row.group or sample.group)
            if row.label != dataset.label_text(sample):
                if not isinstance(sample.target, int) or row.label not in position:
                    known = did_you_mean(row.label, dataset.classes)
                    problems.append(Problem(printable(row.file), f"its label {row.label!r} is no class of the data.{known}"))
                    continue
                changed, n_other = replace(changed, target=position[row.label]), n_other + 1
            samples.append(changed)
    left = {label for sample in samples for label in sample.labels}
    problems += [Problem(name, "no image is left of this class") for name, label in position.items() if label not in left]
    if problems:
        raise DataError(f"{printable(path)}: does not fit the data in {dataset.root}", problems)
    sentence = f"{printable(path)} corrects the data: {n_out:,} left out, {n_other:,} with another label"
    return replace(dataset, samples=tuple(samples), understood=(*dataset.understood, sentence))


def _read(path: Path) -> list[Row]:
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise DataError(f"{printable(path)}: the manifest cannot be read: {error.strerror}") from None
    lines = csv.DictReader(io.StringIO(text, newline=""))
    missing = [name for name in ("file", "label", "use", "group", "sha256") if name not in (lines.fieldnames or ())]
    if missing:
        raise DataError(f"{printable(path)}: not a manifest of finetune check --fix; it has no column {', '.join(missing)}")
    rows = [Row(**{name: line.get(name) or "" for name in COLUMNS}) for line in lines]
    unclear = [row for row in rows if row.use.strip().casefold() not in _USE]
    if unclear:
        wrong = [Problem(printable(row.file), f"use is {row.use!r}; yes or no") for row in unclear]
        raise DataError(f"{printable(path)}: the column use says yes or no", wrong)
    return rows


def _by_content(rows: Sequence[Row]) -> Mapping[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.sha256].append(row)
    return found


def _row_of(sample: Sample, by_content: Mapping[str, list[Row]]) -> Row | None:
    """Return the row of a sample: the only row with its bytes or, among several, the one with its id; None if there is none."""
    rows = by_content.get(sample.sha256, [])
    named = next((row for row in rows if row.file == sample.id), None)
    return named or (rows[0] if len(rows) == 1 else None)
