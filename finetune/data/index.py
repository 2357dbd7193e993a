"""Labelled data, wherever it comes from, as one dataset: samples, classes, and everything that is wrong with it at once.

Sources list what they hold (`finetune.data.sources`); here classes are aligned over splits and sources by name, never by
position. No image is opened. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.data.dataset import Dataset, Sample, Split, unmeasured
from finetune.data.sources import Notes, Record, Source, source_of
from finetune.errors import DataError, Problem, did_you_mean
from finetune.messages import natural_list, plural, printable
from finetune.naming import dataset_name

_ByClass = Mapping[str, tuple[Record, ...]]


def index_dataset(
    training: Path, validation: Path | None = None, test: Path | None = None, *, for_training: bool = True
) -> Dataset:
    """Find the classes and samples of `training`, and of separate `validation` and `test` data when given.

    Samples of data without splits have no split yet, unless validation data is given beside it.

    Args:
        for_training: refuse what could be judged on, but not trained on: a single class, classes of a single image.

    Raises:
        DataError: with one `Problem` for everything that keeps the data from being used.
    """
    notes = Notes()
    source = source_of(training)
    base = (training if training.is_dir() else training.parent).resolve()
    found, places = _read_all(training, validation, test, base, notes)
    if for_training:
        classes = tuple(sorted(found.get("train") or found.get(None) or {}))
        _check_classes(found, places, notes)
    else:
        classes = tuple(sorted({name for by_class in found.values() for name, records in by_class.items() if records}))
        if not classes:
            notes.problem(training, "holds no labelled image")
    if notes.problems:
        raise DataError(_refusal(training, source, notes.problems, for_training), notes.problems)
    label_of = {name: label for label, name in enumerate(classes)}
    samples = [
        Sample(record.id, record.file, label_of[name], split)
        for split, by_class in found.items()
        for name, records in sorted(by_class.items())
        for record in records
        if name in label_of
    ]
    return Dataset(dataset_name(training), str(base), classes, tuple(samples), tuple(notes.bad), notes.warnings())


def _refusal(training: Path, source: Source, problems: Sequence[Problem], for_training: bool) -> str:
    use = "cannot be trained on" if for_training else "cannot be measured on"
    return f"{printable(training)}: {use}, {plural(len(problems), 'problem')}. Expected {source.expected(training)}."


def _read_all(
    training: Path, validation: Path | None, test: Path | None, base: Path, notes: Notes
) -> tuple[dict[Split | None, _ByClass], dict[Split | None, str]]:
    """Read the training data, and what was given for validation and testing beside it."""
    main = source_of(training).read(training, base, notes)
    found, places = dict(main.splits), dict(main.places)
    separate: tuple[tuple[Split, Path | None], ...] = (("val", validation), ("test", test))
    for split, location in separate:
        if location is None:
            continue
        if split in found:
            notes.problem(
                training, f"two sets for {split}: {places[split]} inside and {printable(location)} given separately; give one"
            )
        listed = source_of(location).read(location, base, notes)
        if not listed.splits:  # its problem is noted
            continue
        found[split] = _merged(tuple(listed.splits.values()))
        places[split] = str(location.resolve())
        if any(name is not None for name in listed.splits):
            notes.problem(location, f"has splits of its own, but is given as {split} data; give the folder of one split")
    # Test data of one's own does not spare the cut of a validation set: then the training data is still to be split.
    if "val" in found and None in found:
        found = {"train" if split is None else split: by_class for split, by_class in found.items()}
        places = {"train" if split is None else split: place for split, place in places.items()}
    return found, places


def _merged(parts: Sequence[_ByClass]) -> _ByClass:
    names = {name for part in parts for name in part}
    return {name: tuple(record for part in parts for record in part.get(name, ())) for name in sorted(names)}


def _check_classes(found: Mapping[Split | None, _ByClass], places: Mapping[Split | None, str], notes: Notes) -> None:
    """Note problems and warnings about the classes of each split and their counts."""
    key: Split | None = "train" if "train" in found else None
    if key not in found:
        if not notes.problems:
            notes.problem(next(iter(places.values()), ""), "nothing to train on: all of it is for validation or testing")
        return
    train, place = found[key], places[key]
    _check_number_of_classes(train, place, notes)
    for name, records in train.items():
        if not records:
            unusable = _unusable(f"{place}/{name}/", notes)
            notes.problem(_inside(place, name), f"class {name!r} has no images{unusable}. Add some, or remove the folder")
        elif len(records) == 1 and "val" not in found:
            notes.problem(
                _inside(place, name), f"class {name!r} has 1 image; it takes at least 2, one to train on and one to validate on"
            )
    others: tuple[Split, ...] = ("val", "test")
    for split in others:
        if split in found:
            _compare_classes(split, found[split], train, places[split], notes)


def _inside(place: str, name: str) -> str:
    """Return where a class is: a folder of its own, unless it is rows of a table."""
    return f"{place}/{name}" if Path(place).is_dir() else place


def _unusable(inside: str, notes: Notes) -> str:
    """Return what is in a folder instead of images, in brackets."""
    bad = [image for image in notes.bad if image.where.startswith(inside)]
    if not bad:
        return ""
    others = f"; and {len(bad) - 1:,} more" if len(bad) > 1 else ""
    return f" ({printable(Path(bad[0].where).name)}: {bad[0].reason}{others})"


def _check_number_of_classes(train: _ByClass, place: str, notes: Notes) -> None:
    if not train:
        notes.problem(place, "no class folders found")
    if len(train) != 1:
        return
    ((name, records),) = train.items()
    inside = [record.id.rpartition(f"{name}/")[2].split("/") for record in records]
    nested = sorted({parts[0] for parts in inside if len(parts) > 1})
    hint = f" If {natural_list(nested)} are the classes, give {printable(place)}/{name} instead" if nested else ""
    notes.problem(place, f"only one class, {name!r} with {plural(len(records), 'image')}; it takes at least two.{hint}")


def _compare_classes(split: str, by_class: _ByClass, train: _ByClass, place: str, notes: Notes) -> None:
    for name in sorted(set(by_class) - set(train)):
        if by_class[name]:
            n_images, known = plural(len(by_class[name]), "image"), did_you_mean(name, sorted(train))
            notes.problem(_inside(place, name), f"class {name!r} with {n_images} is not among the training classes.{known}")
    missing = [name for name in sorted(train) if not by_class.get(name)]
    if not any(by_class.values()):
        notes.problem(place, f"the {split} data has no images in class folders")
    elif missing:
        notes.left_out.append(unmeasured(split, missing))
