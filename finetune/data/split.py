"""Which images train, which choose, which judge: stratified splits and folds, pure functions of (contents, numbers, seed).

Where the folder lies, what files are called and in which order they were found have no influence: images are drawn by a hash of
the seed and their bytes. Files with the same bytes are one draw, so no photograph is on two sides. Knows nothing about pixels;
images that merely look alike are not kept together here. Torch-free.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.dataset import SPLITS, Dataset, Sample
from finetune.errors import DataChangedError, DataError, Problem
from finetune.messages import natural_list, plural, printable
from finetune.storage.files import write_atomic

COLUMNS = ("path", "label", "split", "sha256")


def split_dataset(dataset: Dataset, *, val_fraction: float = 0.15, test_fraction: float = 0.15, seed: int = 0) -> Dataset:
    """Return the dataset with every sample in a split, sorted by split, class and path.

    A split that the user made stays as it is: with a validation folder nothing is cut at all, with only a test folder the
    validation set is cut from the rest. Every class with two images or more is in train and in val; with three or more, also
    in test when there is one.

    Raises:
        DataError: a class has a single distinct image, so that it cannot be both trained on and validated on.
    """
    given = {sample.split for sample in dataset.samples}
    if "val" in given:
        return _sorted(dataset, (replace(sample, split=sample.split or "train") for sample in dataset.samples))
    kept = [sample for sample in dataset.samples if sample.split == "test"]
    loose = [sample for sample in dataset.samples if sample.split != "test"]
    by_class = _draws_by_class(dataset, loose, seed)
    _refuse_single_images(dataset, by_class)
    for draws in by_class.values():
        sizes = [len(draw) for draw in draws]
        for draw, split in zip(draws, cut(sizes, val_fraction, 0.0 if "test" in given else test_fraction), strict=True):
            kept += [replace(sample, split=split) for sample in draw]
    return _sorted(dataset, kept)


def fold_datasets(dataset: Dataset, n_folds: int, *, val_fraction: float = 0.15, seed: int = 0) -> tuple[Dataset, ...]:
    """Return one dataset for each fold of the train and val images: a part held out as ``test``, the rest train and val.

    Every image of the pool is held out in exactly one fold. What was ``test`` before is in none of them: it stays untouched.

    Raises:
        DataError: a class has too few distinct images to be in every fold's train, val and test.
    """
    pool = [sample for sample in dataset.samples if sample.split != "test"]
    by_class = _draws_by_class(dataset, pool, seed)
    _refuse_too_many_folds(dataset, by_class, n_folds)
    fold_of_draw = deal({label: [len(draw) for draw in draws] for label, draws in by_class.items()}, n_folds)
    folds = []
    for fold in range(n_folds):
        samples = [
            replace(sample, split="test" if dealt_to == fold else None)
            for label, draws in by_class.items()
            for draw, dealt_to in zip(draws, fold_of_draw[label], strict=True)
            for sample in draw
        ]
        # The seed of another fold would choose with much the same images again.
        divided = replace(dataset, samples=tuple(samples))
        folds.append(split_dataset(divided, val_fraction=val_fraction, seed=seed + ((fold + 1) << 32)))
    return tuple(folds)


def deal(sizes: Mapping[int, Sequence[int]], n_folds: int) -> dict[int, list[int]]:
    """Return the fold of each draw of each class, given how many images each holds; draws come in random order.

    Of each class all folds get the same number of draws, or one more. The largest draws go first, each to the fold with the
    fewest images so far, of its class and then of all: so sizes stay close, and the odd ones do not all land in the first folds.
    """
    images = [0] * n_folds
    folds: dict[int, list[int]] = {}
    for label in sorted(sizes):
        draws_of_class, images_of_class = [0] * n_folds, [0] * n_folds
        folds[label] = [0] * len(sizes[label])
        for position in sorted(range(len(sizes[label])), key=lambda position: -sizes[label][position]):
            fold = min(range(n_folds), key=lambda fold: (draws_of_class[fold], images_of_class[fold], images[fold]))
            draws_of_class[fold] += 1
            images_of_class[fold] += sizes[label][position]
            images[fold] += sizes[label][position]
            folds[label][position] = fold
    return folds


def cut(sizes: Sequence[int], val_fraction: float, test_fraction: float) -> list[str]:
    """Return the split of each draw of one class, given how many images each holds; draws come in random order.

    A draw that would overshoot what is left of a split's share goes on to the next one, in the end to train. A split that
    every draw would overshoot gets the smallest draw that another split can spare.
    """
    wanted = ("val", "test") if test_fraction > 0 and len(sizes) > 2 else ("val",)
    left = _shares(sum(sizes), val_fraction, test_fraction if "test" in wanted else 0.0)
    splits: list[str] = []
    for size in sizes:
        split = next((name for name in wanted if size <= left[name]), "train")
        left[split] -= size
        splits.append(split)
    for name in wanted:
        counts = Counter(splits)
        spare = [position for position, split in enumerate(splits) if counts[split] > 1]
        if not counts[name] and spare:
            splits[min(spare, key=lambda position: sizes[position])] = name
    return splits


def write_split(path: Path, dataset: Dataset, left_out: Sequence[Sample] = ()) -> None:
    """Write CSV with a header: path (the sample's id), label (the class name), split, sha256 (of the file's bytes).

    Args:
        left_out: samples of the same data that the split does not use; their column ``split`` is empty.
    """
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for sample in dataset.samples:
        rows.writerow((sample.id, dataset.label_text(sample), sample.split or "", sample.sha256))
    for sample in left_out:
        rows.writerow((sample.id, dataset.label_text(sample), "", sample.sha256))
    # File names may be any bytes: surrogateescape writes back the very bytes that the file system gave.
    write_atomic(path, lambda stream: stream.write(text.getvalue().encode("utf-8", "surrogateescape")))


def read_split(path: Path, dataset: Dataset) -> Dataset:
    """Return the dataset with the split that a CSV file of `write_split` records.

    Raises:
        DataChangedError: its rows and the dataset's files are not the same.
        DataError: the file is not such a CSV.
    """
    recorded = _read_rows(path)
    problems = []
    samples = []
    for sample in dataset.samples:
        name = sample.id
        label, split, sha256 = recorded.pop(name, ("", "", ""))
        if not label:
            problems.append(Problem(printable(name), "is in the dataset, but not in the recorded split"))
        elif label != dataset.label_text(sample):
            problems.append(Problem(printable(name), f"was {label!r}, now {dataset.label_text(sample)!r}"))
        elif sha256 and sample.sha256 and sha256 != sample.sha256:
            problems.append(Problem(printable(name), "has other bytes than when the split was recorded"))
        if split:
            samples.append(replace(sample, split=split))
    problems += [Problem(printable(name), "is in the recorded split, but no longer in the dataset") for name in recorded]
    if problems:
        raise DataChangedError(
            f"{printable(path)}: the data changed since this run began. Give another --run-dir (or delete this one) to begin "
            "anew with the data as it is now, or undo the change",
            problems,
        )
    return _sorted(dataset, samples)


@dataclass(frozen=True)
class RecordedSample:
    """One row of a recorded split."""

    id: str
    label: str
    split: str  # empty where the sample was left out
    sha256: str


def read_recorded_split(path: Path) -> list[RecordedSample]:
    """Return the rows of a CSV file that `write_split` wrote.

    Raises:
        DataError: it cannot be read, or is not such a file.
    """
    return [RecordedSample(name, *row) for name, row in _read_rows(path).items()]


# ---------------------------------------------------------------------------------------------------------------- internals


def _identity(dataset: Dataset, sample: Sample) -> str:
    """Return what identifies an image in the draw: the digest of its bytes, or its id where nobody has read them."""
    return sample.sha256 or sample.id


def _draws_by_class(dataset: Dataset, samples: Iterable[Sample], seed: int) -> dict[int, list[list[Sample]]]:
    """Return the draws of each class, in an order that only seed and bytes decide.

    Samples with the same bytes are one draw, which counts for its most frequent class.
    """
    draws: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        draws[_identity(dataset, sample)].append(sample)
    by_class: dict[int, list[list[Sample]]] = defaultdict(list)
    for identity in sorted(draws, key=lambda identity: _lot(seed, identity)):
        by_class[_main_label(draws[identity])].append(draws[identity])
    return by_class


def _lot(seed: int, identity: str) -> bytes:
    return hashlib.blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=16, key=seed.to_bytes(8, "little")).digest()


def _stratum(sample: Sample) -> int:
    """Return the class that a sample is drawn with: its first label, -1 for a sample without labels."""
    return sample.labels[0] if sample.labels else -1


def _main_label(draw: Sequence[Sample]) -> int:
    counts = Counter(_stratum(sample) for sample in draw)
    return min(counts, key=lambda label: (-counts[label], label))


def _shares(n_images: int, val_fraction: float, test_fraction: float) -> dict[str, int]:
    """Return how many of a class's images each split should get: at least one each, if there are as many."""
    n_test = max(1, round(n_images * test_fraction)) if test_fraction > 0 else 0
    n_val = max(1, min(round(n_images * val_fraction), n_images - 1 - min(n_test, 1)))
    n_test = min(n_test, max(0, n_images - 1 - n_val))
    return {"val": n_val, "test": n_test, "train": n_images - n_val - n_test}


def _refuse_single_images(dataset: Dataset, by_class: dict[int, list[list[Sample]]]) -> None:
    problems = []
    for label, name in enumerate(dataset.classes):
        draws = by_class.get(label, [])
        if len(draws) < 2:
            n_files = sum(len(draw) for draw in draws)
            found = (
                f"{plural(n_files, 'readable file')} of {len(draws)} distinct image"
                if n_files
                else "no image that is not in another class too"
            )
            problems.append(Problem(name, f"{found}; it takes at least 2, one to train on and one to validate on"))
    if problems:
        names = natural_list(problem.where for problem in problems)
        raise DataError(
            f"{printable(dataset.root)}: too few distinct images to split: {names}. Add images, remove the folders, "
            "or give a validation folder of your own (validation_file).",
            problems,
        )


def _refuse_too_many_folds(dataset: Dataset, by_class: Mapping[int, Sequence[object]], n_folds: int) -> None:
    counts = {label: len(by_class.get(label, ())) for label in range(len(dataset.classes))}
    problems = [
        Problem(dataset.classes[label], f"{plural(count, 'distinct image')}; {_foldable(count)}")
        for label, count in counts.items()
        if not _folds_fit(count, n_folds)
    ]
    if problems:
        smallest = min(counts, key=lambda label: counts[label])
        raise DataError(
            f"data.folds: {n_folds} does not fit {printable(dataset.root)}: class {dataset.classes[smallest]!r} has "
            f"{plural(counts[smallest], 'distinct image')} to train, choose and test on, and {_foldable(counts[smallest])}. "
            "Give another number of folds, or add images.",
            problems,
        )


def _folds_fit(count: int, n_folds: int) -> bool:
    """Return whether each fold can test on one of a class's `count` images, train on another and choose on a third."""
    return n_folds <= count and count - math.ceil(count / n_folds) >= 2


def _foldable(count: int) -> str:
    """Return in words which numbers of folds a class with `count` distinct images allows."""
    if count < 3:
        return "folds need at least 3"
    return "only 3 folds are possible" if count == 3 else f"2 to {count} folds are possible"


def _sorted(dataset: Dataset, samples: Iterable[Sample]) -> Dataset:
    def key(sample: Sample) -> tuple[int, tuple[int, ...], str]:
        return SPLITS.index(sample.split or "train"), sample.labels, sample.id

    return replace(dataset, samples=tuple(sorted(samples, key=key)))


def _read_rows(path: Path) -> dict[str, tuple[str, str, str]]:
    """Return label, split and sha256 by sample id."""
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise DataError(f"{printable(path)}: the split cannot be read: {error.strerror}") from None
    rows = list(csv.reader(io.StringIO(text, newline="")))
    if not rows or tuple(rows[0]) != COLUMNS or any(len(row) != len(COLUMNS) or row[2] not in (*SPLITS, "") for row in rows[1:]):
        raise DataError(f"{printable(path)}: not a recorded split; expected the columns {','.join(COLUMNS)}")
    return {name: (label, split, sha256) for name, label, split, sha256 in rows[1:]}
