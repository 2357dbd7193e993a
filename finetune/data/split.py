"""Split data into train, val and test, and into folds, so that images keep their split when the data grows. Torch-free.

The split of an image depends only on its bytes and the seed: their hash is a number between 0 and 1, and val, test and train each
have an interval of this range. So the location, the names and the order of the files have no influence, and adding or removing
files does not move other images. Images of one group, and files with the same bytes, are drawn together. The shares of the splits
are those requested on average, but not exactly.

There is one exception: if a split would have no image of a class, the image of the class whose number is nearest to the interval
is moved there. Only such an image can change its split when other images of its class are added.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.dataset import SPLITS, Dataset, Sample, targets_of
from finetune.errors import DataChangedError, DataError, Problem
from finetune.messages import natural_list, plural, printable
from finetune.storage.files import write_atomic
from finetune.tasks import task_of

COLUMNS = ("path", "label", "split", "sha256", "group")
_WITHOUT_GROUPS = COLUMNS[:4]  # of files that earlier releases wrote
MOST_PROPOSED_FOLDS = 5
_FAR_FROM_ASKED, _ENOUGH_IMAGES = 2.0, 50  # factor between requested and actual share, from which a warning is given


def split_dataset(
    dataset: Dataset,
    *,
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
    seed: int = 0,
    recorded: Mapping[str, str] | None = None,
) -> Dataset:
    """Return the dataset with every sample in a split, sorted by split, class and contents.

    Splits that the user gives are kept: with validation data nothing is drawn, with test data alone the validation set is drawn
    from the rest. Every class with at least two distinct images is in train and val; with at least three, also in test if there
    is one.

    Args:
        recorded: the split of images by the sha256 of their bytes, from an earlier split; only other images are drawn.

    Raises:
        DataError: a class has a single distinct image, so that it cannot be both trained on and validated on.
    """
    given = {sample.split for sample in dataset.samples}
    if "val" in given:
        if recorded is not None:
            raise DataError(
                f"{printable(dataset.root)}: validation images are given, so data.split_file has no effect; leave out one of them"
            )
        return _sorted(dataset, (replace(sample, split=sample.split or "train") for sample in dataset.samples))
    kept = [sample for sample in dataset.samples if sample.split == "test"]
    loose = [sample for sample in dataset.samples if sample.split != "test"]
    units = _units(loose, seed, "split")
    _refuse_single_images(dataset, units)
    shares = {"val": val_fraction, "test": 0.0 if "test" in given else test_fraction}
    sides = _sides(units, shares, recorded or {})
    for unit, side in zip(units, sides, strict=True):
        kept += [replace(sample, split=(recorded or {}).get(sample.sha256) or side) for sample in unit.samples]
    divided = _sorted(dataset, kept)
    told = (*_far_from_asked(divided, loose, shares), *_scarce(dataset, divided))
    return replace(divided, warnings=(*divided.warnings, *told))


def fold_datasets(dataset: Dataset, n_folds: int, *, val_fraction: float = 0.15, seed: int = 0) -> tuple[Dataset, ...]:
    """Return one dataset for each fold of the train and val images: a part is held out as ``test``, the rest is train and val.

    Every image of the pool is held out in exactly one fold, which depends on the image and the seed. The previous test images are
    in none of the folds.

    Raises:
        DataError: a class has too few distinct images to be in every fold's train, val and test.
    """
    pool = [sample for sample in dataset.samples if sample.split != "test"]
    units = _units(pool, seed, "fold")
    _refuse_too_many_folds(dataset, units, n_folds)
    dealt = _deal(units, n_folds)
    folds = []
    for fold in range(n_folds):
        samples = [
            replace(sample, split="test" if dealt_to == fold else None)
            for unit, dealt_to in zip(units, dealt, strict=True)
            for sample in unit.samples
        ]
        # Another seed for each fold: with the same one, most val images of all folds would be the same.
        divided = replace(dataset, samples=tuple(samples))
        folds.append(split_dataset(divided, val_fraction=val_fraction, seed=seed + ((fold + 1) << 32)))
    return tuple(folds)


def leaked(dataset: Dataset) -> dict[str, frozenset[str]]:
    """Return, for val and test, the ids of samples that were trained on: the same bytes, or the same group, are in train.

    Splits that are drawn here have none; splits that the user gives may have some.
    """
    train = [sample for sample in dataset.samples if sample.split == "train"]
    seen = {_content(sample) for sample in train} | {f"group {sample.group}" for sample in train if sample.group is not None}
    found = {}
    for split in ("val", "test"):
        keys = {sample.id: {_content(sample), f"group {sample.group}"} for sample in dataset.of(split)}
        if ids := frozenset(sample_id for sample_id, own in keys.items() if own & seen):
            found[split] = ids
    return found


def write_split(path: Path, dataset: Dataset, left_out: Sequence[Sample] = ()) -> None:
    """Write CSV with a header: path (the sample's id), label (the class name), split, sha256 (of the file's bytes), group.

    Args:
        left_out: samples of the same data that the split does not use; their column ``split`` is empty.
    """
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for sample, split in [*((one, one.split or "") for one in dataset.samples), *((one, "") for one in left_out)]:
        rows.writerow((sample.id, dataset.label_text(sample), split, sample.sha256, sample.group or ""))
    write_atomic(path, lambda stream: stream.write(text.getvalue().encode("utf-8", "surrogateescape")))


def read_split(path: Path, dataset: Dataset) -> Dataset:
    """Return the dataset with the split that a CSV file of `write_split` records.

    Raises:
        DataChangedError: its rows and the dataset's files are not the same.
        DataError: the file is not such a CSV.
    """
    recorded = {row.id: row for row in read_recorded_split(path)}
    problems = []
    samples = []
    for sample in dataset.samples:
        name = sample.id
        row = recorded.pop(name, None)
        if row is None:
            problems.append(Problem(printable(name), "is in the dataset, but not in the recorded split"))
        elif row.label != dataset.label_text(sample):
            problems.append(Problem(printable(name), f"was {row.label!r}, now {dataset.label_text(sample)!r}"))
        elif row.sha256 and sample.sha256 and row.sha256 != sample.sha256:
            problems.append(Problem(printable(name), "has other bytes than when the split was recorded"))
        if row is not None and row.split:
            samples.append(replace(sample, split=row.split))
    problems += [Problem(printable(name), "is in the recorded split, but no longer in the dataset") for name in recorded]
    if problems:
        raise DataChangedError(
            f"{printable(path)}: the data changed since this run began. Give another --run-dir (or delete this one) to begin "
            "anew with the data as it is now, or undo the change",
            problems,
        )
    divided = _sorted(dataset, samples)
    return replace(divided, warnings=(*divided.warnings, *_scarce(dataset, divided)))


@dataclass(frozen=True)
class RecordedSample:
    """One row of a recorded split."""

    id: str
    label: str
    split: str  # empty where the sample was left out
    sha256: str
    group: str = ""


def read_recorded_split(path: Path) -> list[RecordedSample]:
    """Return the rows of a CSV file that `write_split` wrote.

    Raises:
        DataError: the file cannot be read, or is no such file.
    """
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise DataError(f"{printable(path)}: the split cannot be read: {error.strerror}") from None
    rows = list(csv.reader(io.StringIO(text, newline="")))
    columns = tuple(rows[0]) if rows else ()
    whole = all(len(row) == len(columns) and row[2] in (*SPLITS, "") for row in rows[1:])
    if columns not in (COLUMNS, _WITHOUT_GROUPS) or not whole:
        raise DataError(f"{printable(path)}: not a recorded split; expected the columns {','.join(COLUMNS)}")
    return [RecordedSample(*row) for row in rows[1:]]


def recorded_sides(path: Path) -> dict[str, str]:
    """Return the split of each image in a recorded split by the sha256 of its bytes, for `split_dataset`.

    Raises:
        DataError: the file is no recorded split, or has no digests.
    """
    rows = read_recorded_split(path)
    sides = {row.sha256: row.split for row in rows if row.sha256 and row.split}
    if rows and not sides:
        raise DataError(f"{printable(path)}: has no sha256 of any image, so it cannot be used for other data")
    return sides


# ------------------------------------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class _Unit:
    """Samples that are always in the same split: one image, all files with its bytes, and all images of its group."""

    samples: tuple[Sample, ...]
    lot: float  # from 0 to 1, decided by the unit itself and the seed

    @property
    def labels(self) -> frozenset[int]:
        return frozenset(label for sample in self.samples for label in sample.labels)


def _content(sample: Sample) -> str:
    """Return the identity of an image: the digest of its bytes; its id in a dataset that is not checked yet."""
    return sample.sha256 or sample.id


def _units(samples: Iterable[Sample], seed: int, purpose: str) -> list[_Unit]:
    """Return the units that are drawn together, in the order of their lots."""
    found: dict[str, str] = {}  # key -> a key of the same unit, in the end its smallest

    def first_of(key: str) -> str:
        while found[key] != key:
            found[key] = key = found[found[key]]
        return key

    keys_of: list[tuple[Sample, str]] = []
    for sample in samples:
        content = f"image {_content(sample)}"
        keys = [content] if sample.group is None else [f"group {sample.group}", content]
        for key in keys:
            found.setdefault(key, key)
        first, second = sorted((first_of(keys[0]), first_of(keys[-1])))
        found[second] = first  # "group" comes before "image": a group's lot does not change when images join it
        keys_of.append((sample, content))
    together: dict[str, list[Sample]] = defaultdict(list)
    for sample, content in keys_of:
        together[first_of(content)].append(sample)
    units = [_Unit(tuple(members), _lot(seed, purpose, key)) for key, members in together.items()]
    return sorted(units, key=lambda unit: (unit.lot, _content(unit.samples[0])))


def _lot(seed: int, purpose: str, key: str) -> float:
    text = f"{purpose} {key}".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64


def _sides(units: Sequence[_Unit], shares: Mapping[str, float], recorded: Mapping[str, str]) -> list[str]:
    """Return the split of each unit: as recorded, else by its lot. Then move units so that every split has every class."""

    def by_lot(unit: _Unit) -> str:
        known = [side for sample in unit.samples if (side := recorded.get(sample.sha256))]
        if known:
            return known[0]
        if unit.lot < shares["val"]:
            return "val"
        return "test" if unit.lot < shares["val"] + shares["test"] else "train"

    filling = _Filling(
        [by_lot(unit) for unit in units],
        fixed=[any(sample.sha256 in recorded for sample in unit.samples) for unit in units],
        labels=[unit.labels for unit in units],
        of_class=_of_class(units),
    )
    filling.fill("train", from_the_end=True)
    filling.fill("val")
    if shares["test"] > 0:
        filling.fill("test")
    return filling.sides


def _of_class(units: Sequence[_Unit]) -> dict[int, list[int]]:
    """Return the positions of the units that hold each class, by class."""
    found: dict[int, list[int]] = defaultdict(list)
    for position, unit in enumerate(units):
        for label in unit.labels:
            found[label].append(position)
    return dict(sorted(found.items()))


_NEEDED = {"train": 1, "val": 2, "test": 3}  # units of a class from which it is in this split too


@dataclass
class _Filling:
    """Moves single units into splits that have no image of a class. Positions of units are in the order of their lots."""

    sides: list[str]
    fixed: Sequence[bool]
    labels: Sequence[frozenset[int]]
    of_class: Mapping[int, Sequence[int]]

    def fill(self, side: str, *, from_the_end: bool = False) -> None:
        """Move into `side` a unit of every class that is missing there and has enough units: the one with the nearest lot."""
        for positions in self.of_class.values():
            if len(positions) < _NEEDED[side] or any(self.sides[position] == side for position in positions):
                continue
            nearest = reversed(positions) if from_the_end else iter(positions)
            spare = next((position for position in nearest if self._is_spare(position)), None)
            if spare is not None:
                self.sides[spare] = side

    def _is_spare(self, position: int) -> bool:
        """Return whether its split keeps another unit of each of its classes if this unit is moved."""
        donor = self.sides[position]
        return not self.fixed[position] and all(self._has_more(donor, label) for label in self.labels[position])

    def _has_more(self, donor: str, label: int) -> bool:
        positions = self.of_class[label]
        return len(positions) < _NEEDED[donor] or sum(self.sides[other] == donor for other in positions) > 1


def _deal(units: Sequence[_Unit], n_folds: int) -> list[int]:
    """Return the fold of each unit: by its lot, but every class with enough units is in every fold."""
    folds = [min(int(unit.lot * n_folds), n_folds - 1) for unit in units]
    least = 2 if n_folds == 2 else 1  # so that the other folds leave two of each class, to train and to choose on
    for positions in _of_class(units).values():
        for fold in range(n_folds):
            while sum(folds[position] == fold for position in positions) < min(least, len(positions) // n_folds):
                counts = Counter(folds[position] for position in positions)
                donor = max(counts, key=lambda one: (counts[one], -one))
                folds[next(position for position in positions if folds[position] == donor)] = fold
    return folds


# ----------------------------------------------------------------------------------------------------------- refusals, words


def _refuse_single_images(dataset: Dataset, units: Sequence[_Unit]) -> None:
    if not _needs_every_class(dataset):
        return
    problems = []
    found_of_class = _of_class(units)
    for label, name in enumerate(dataset.classes):
        of_class = [units[position] for position in found_of_class.get(label, ())]
        if len(of_class) >= 2:
            continue
        n_files = sum(label in sample.labels for unit in of_class for sample in unit.samples)
        grouped = any(sample.group is not None for unit in of_class for sample in unit.samples)
        what = "group" if grouped else "distinct image"
        found = f"{plural(n_files, 'readable file')} of {len(of_class)} {what}"
        problems.append(Problem(name, f"{found}; it takes at least 2, one to train on and one to validate on"))
    if problems:
        names = natural_list(problem.where for problem in problems)
        raise DataError(
            f"{printable(dataset.root)}: too few distinct images to split: {names}. Add images, remove the classes, "
            "or give validation data of your own (validation_file).",
            problems,
        )


def _needs_every_class(dataset: Dataset) -> bool:
    """Return whether data with a class that has too few images is refused, by the task that its labels ask for."""
    return task_of(targets_of(dataset.samples)).needs_every_class


def refuse_impossible_folds(dataset: Dataset, n_folds: int) -> None:
    """Refuse a number of folds for which a class has too few images or groups, before any file is read.

    Images with the same bytes count as one for `fold_datasets`, which may therefore refuse more.

    Raises:
        DataError: it names the classes and the largest number of folds that works.
    """
    groups: dict[int, set[str]] = defaultdict(set)
    for sample in dataset.samples:
        if sample.split != "test":
            for label in sample.labels:
                groups[label].add(f"image {sample.id}" if sample.group is None else f"group {sample.group}")
    _check_folds(dataset, {label: len(groups[label]) for label in range(len(dataset.classes))}, n_folds, "image")


def _refuse_too_many_folds(dataset: Dataset, units: Sequence[_Unit], n_folds: int) -> None:
    of_class = _of_class(units)
    _check_folds(
        dataset, {label: len(of_class.get(label, ())) for label in range(len(dataset.classes))}, n_folds, "distinct image"
    )


def _check_folds(dataset: Dataset, counts: Mapping[int, int], n_folds: int, noun: str) -> None:
    """Raise `DataError` if a class with one of these counts cannot be in train, val and test of each fold."""
    few = {label: count for label, count in counts.items() if not _folds_fit(count, n_folds)}
    if not few:
        return
    smallest = min(counts, key=lambda label: counts[label])
    count = counts[smallest]
    if count < _FEWEST_TO_FOLD:
        advice = (
            f"No number of folds works with fewer than {_FEWEST_TO_FOLD}: add images, leave the class out, or train without folds"
        )
    else:
        advice = f"The largest number that works is --folds {count}; more images of it allow more"
    raise DataError(
        f"data.folds: {n_folds} does not fit {printable(dataset.root)}: class {dataset.classes[smallest]!r} has "
        f"{plural(count, noun)} to train, choose and test on. {advice}.",
        [Problem(dataset.classes[label], f"{plural(one, noun)}; {_foldable(one)}") for label, one in few.items()],
    )


_FEWEST_TO_FOLD = 3  # images of a class: one each to train, choose and test on


def _folds_fit(count: int, n_folds: int) -> bool:
    """Return whether each fold can have one of a class's `count` images in test, one in train and one in val."""
    return n_folds <= count and count - math.ceil(count / n_folds) >= 2


def _foldable(count: int) -> str:
    """Return a phrase with the numbers of folds that a class with `count` distinct images allows."""
    if count < _FEWEST_TO_FOLD:
        return f"folds need at least {_FEWEST_TO_FOLD}"
    return "only 3 folds are possible" if count == _FEWEST_TO_FOLD else f"2 to {count} folds are possible"


def _scarce(before: Dataset, divided: Dataset) -> list[str]:
    """Return a warning about the classes that have a single image, or group, left to train on, and the folds that avoid it.

    Args:
        before: the same data before it was divided. Nothing is said if the user divided it.
    """
    given = {sample.id: sample.split for sample in before.samples}
    if not _needs_every_class(divided) or "val" in given.values():
        return []
    units = _units([sample for sample in divided.samples if given.get(sample.id) != "test"], 0, "")
    of_class = _of_class(units)
    trained = Counter(label for unit in units if unit.samples[0].split == "train" for label in unit.labels)
    scarce = [label for label in of_class if trained[label] == 1]
    if not scarce:
        return []
    named = natural_list([f"{divided.classes[label]} (of {len(of_class[label])})" for label in scarce], 5)
    counts = [len(positions) for positions in of_class.values()]
    n_folds = next((n for n in range(MOST_PROPOSED_FOLDS, 1, -1) if all(_folds_fit(count, n) for count in counts)), None)
    warning = f"only 1 image is left to train on: {named}"
    if n_folds is None:
        return [f"{warning}: add images, or merge classes"]
    command = f"finetune train {shlex.quote(printable(divided.root))} --folds {n_folds}"
    return [f"{warning}. Cross-validation trains and tests on all of them, and the final model trains on all: {command}"]


def _far_from_asked(divided: Dataset, loose: Sequence[Sample], shares: Mapping[str, float]) -> list[str]:
    """Return a warning for each split whose share differs much from the requested one because of large groups."""
    if len(loose) < _ENOUGH_IMAGES or all(sample.group is None for sample in loose):
        return []
    sizes = divided.sizes()
    told = []
    for split, share in shares.items():
        got = sizes.get(split, 0) / len(loose)
        if share > 0 and not share / _FAR_FROM_ASKED <= got <= share * _FAR_FROM_ASKED:
            told.append(
                f"{split} has {got:.0%} of the images, where data.{split}_fraction asks for {share:.0%}: the groups are large. "
                "Another data.split_seed may come nearer"
            )
    return told


def _sorted(dataset: Dataset, samples: Iterable[Sample]) -> Dataset:
    """Return the dataset with these samples, in an order that does not depend on their location or format."""

    def key(sample: Sample) -> tuple[int, tuple[int, ...], str, str]:
        return SPLITS.index(sample.split or "train"), sample.labels, _content(sample), sample.id

    return replace(dataset, samples=tuple(sorted(samples, key=key)))
