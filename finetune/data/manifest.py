"""Keep the manifest of each revision of data under its digest, to name, require and compare revisions. Torch-free.

A manifest lists every sample by the sha256 of its bytes, with its labels and, if the data gives them, its split, group and
weight. Its digest, `Dataset.digest`, is the revision. It does not depend on the location, the format or the file names of the
data.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.data.dataset import Dataset
from finetune.errors import DataChangedError, DataError, NotFound
from finetune.messages import plural, printable
from finetune.storage.files import write_atomic

SHOWN_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Row:
    """One sample."""

    id: str
    labels: tuple[str, ...]
    sha256: str
    split: str | None = None
    group: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Manifest:
    """The contents of a dataset. `digest` depends on neither `name` nor `root` nor the ids of the rows."""

    digest: str
    name: str
    root: str
    classes: tuple[str, ...]
    rows: tuple[Row, ...] = field(repr=False)


def manifest_of(dataset: Dataset) -> Manifest:
    """Return the manifest of a checked dataset that is not split yet."""
    rows = [
        Row(sample.id, dataset.label_names(sample), sample.sha256, sample.split, sample.group, sample.weight)
        for sample in dataset.samples
    ]
    return Manifest(dataset.digest, dataset.name, dataset.root, dataset.classes, tuple(sorted(rows, key=_order)))


def _order(row: Row) -> tuple[str, str]:
    return row.sha256, row.id


def keep(folder: Path, dataset: Dataset) -> Path:
    """Write the manifest of a checked dataset under its digest; return its path."""
    path = folder / f"{dataset.digest}.jsonl"
    if not path.exists():
        manifest = manifest_of(dataset)
        head = {"name": manifest.name, "root": manifest.root, "classes": manifest.classes}
        lines = [json.dumps(one, ensure_ascii=True) for one in (head, *map(_as_json, manifest.rows))]
        write_atomic(path, lambda stream: stream.write("\n".join([*lines, ""]).encode("ascii")))
    return path


def _as_json(row: Row) -> dict[str, Any]:
    defaults = {"split": None, "group": None, "weight": 1.0}
    return {key: value for key, value in asdict(row).items() if key not in defaults or value != defaults[key]}


def find_manifest(folder: Path, revision: str) -> Manifest:
    """Return the kept manifest whose digest begins with `revision`.

    Raises:
        NotFound: there is none, or there are several.
        DataError: the manifest is damaged.
    """
    found = sorted(folder.glob(f"{revision}*.jsonl"))
    if len(found) != 1:
        why = "several revisions begin like this" if found else "no such revision is known here; check or train on the data first"
        raise NotFound(f"{revision}: {why}")
    return _read(found[0])


def _read(path: Path) -> Manifest:
    try:
        head, *rows = [json.loads(line) for line in path.read_text("ascii").splitlines()]
        return Manifest(
            digest=path.stem,
            name=head["name"],
            root=head["root"],
            classes=tuple(head["classes"]),
            rows=tuple(Row(**{**row, "labels": tuple(row["labels"])}) for row in rows),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: the manifest is damaged ({error}); delete it and check the data again") from None


def require(dataset: Dataset, revision: str, folder: Path) -> None:
    """Refuse data that is not of this revision.

    Raises:
        DataChangedError: it is another revision. If the requested one is known, the error lists the differences.
    """
    if dataset.digest.startswith(revision):
        return
    try:
        diff = f": {compare(find_manifest(folder, revision), manifest_of(dataset)).sentence()}"
    except (NotFound, DataError):
        diff = ""
    raise DataChangedError(
        f"{printable(dataset.root)}: is revision {dataset.digest[:SHOWN_DIGITS]}, and data.revision asks for {revision}{diff}. "
        "Give the data as it was, or the revision that it is now"
    )


@dataclass(frozen=True)
class Difference:
    """The changes from one revision to another. Ids are those of the later one, except for `removed`.

    Args:
        replaced: ids that are in both with other bytes.
        relabelled: id, labels before, labels after; of the same bytes.
        moved: id, split before, split after; of the same bytes.
        renamed: id before, id after; of the same bytes.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    replaced: tuple[str, ...]
    relabelled: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    moved: tuple[tuple[str, str, str], ...]
    renamed: tuple[tuple[str, str], ...]
    regrouped: tuple[str, ...]
    new_classes: tuple[str, ...]
    lost_classes: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """Count the changes of each kind."""
        return {key: len(value) for key, value in asdict(self).items()}

    def sentence(self) -> str:
        """Return the changes as one phrase, such as ``3 images added, 1 relabelled``."""
        counts = {kind: count for kind, count in self.counts().items() if count}
        classes = {"new_classes": "new class", "lost_classes": "lost class"}
        of_images = [f"{count:,} {kind}" for kind, count in counts.items() if kind not in classes]
        if of_images:
            first = next(kind for kind in counts if kind not in classes)
            of_images[0] = f"{plural(counts[first], 'image')} {first}"
        of_classes = [plural(count, classes[kind]) for kind, count in counts.items() if kind in classes]
        return ", ".join((*of_images, *of_classes)) or "no difference"


def compare(before: Manifest, after: Manifest) -> Difference:
    """Return the changes from `before` to `after`; images are matched by their bytes, then by their ids."""
    olds, news = _by_content(before.rows), _by_content(after.rows)
    pairs: list[tuple[Row, Row]] = []
    gone: list[Row] = []
    new: list[Row] = []
    for sha256 in dict.fromkeys([*olds, *news]):
        matched, left, right = _matched(olds.get(sha256, ()), news.get(sha256, ()))
        pairs += matched
        gone += left
        new += right
    ids_gone = {row.id for row in gone}
    replaced = {row.id for row in new} & ids_gone
    return Difference(
        added=tuple(sorted(row.id for row in new if row.id not in replaced)),
        removed=tuple(sorted(ids_gone - replaced)),
        replaced=tuple(sorted(replaced)),
        relabelled=tuple(sorted((b.id, a.labels, b.labels) for a, b in pairs if a.labels != b.labels)),
        moved=tuple(sorted((b.id, a.split or "", b.split or "") for a, b in pairs if a.split != b.split)),
        renamed=tuple(sorted((a.id, b.id) for a, b in pairs if a.id != b.id)),
        regrouped=tuple(sorted(b.id for a, b in pairs if (a.group, a.weight) != (b.group, b.weight))),
        new_classes=tuple(sorted(set(after.classes) - set(before.classes))),
        lost_classes=tuple(sorted(set(before.classes) - set(after.classes))),
    )


def _by_content(rows: Iterable[Row]) -> Mapping[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.sha256].append(row)
    return found


def _matched(olds: Sequence[Row], news: Sequence[Row]) -> tuple[list[tuple[Row, Row]], list[Row], list[Row]]:
    """Pair rows with the same bytes: first those of the same id, then of the same labels, then the rest in order."""
    pairs = []
    left, right = list(olds), list(news)
    for key in (lambda row: row.id, lambda row: row.labels, lambda row: ""):
        for old in list(left):
            match = next((new for new in right if key(new) == key(old)), None)
            if match is not None:
                pairs.append((old, match))
                left.remove(old)
                right.remove(match)
    return pairs, left, right
