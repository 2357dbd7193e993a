"""Read labelled data from any source as one dataset: samples and classes; report all problems at once.

`finetune.data.places` opens locations, `finetune.data.sources` lists their samples; this module aligns classes over splits and
sources by name, never by position. No image is decoded. Torch-free.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.dataset import BadImage, Dataset, Sample, Split, unmeasured
from finetune.data.layout import without_wrapping
from finetune.data.names import problem_of_class_name, same_class
from finetune.data.notes import Notes
from finetune.data.places import Place, open_place
from finetune.data.places.opening import NO_SPREADSHEETS, SPREADSHEETS
from finetune.data.places.tree import shown_path
from finetune.data.reading import Reading
from finetune.data.separators import forgotten_separator, how_to_separate
from finetune.data.sources import Listing, Record, Source, source_of
from finetune.data.tables import SUFFIXES
from finetune.errors import DataError, Problem, did_you_mean
from finetune.messages import natural_list, plural, printable
from finetune.naming import dataset_name

Location = Path | str


def index_dataset(
    training: Location,
    validation: Location | None = None,
    test: Location | None = None,
    *,
    for_training: bool = True,
    reading: Reading | None = None,
) -> Dataset:
    """Return the classes and samples of `training`, and of separate `validation` and `test` data if given.

    Samples of data without splits have no split yet, unless separate validation data is given.

    Args:
        for_training: refuse data that is sufficient for an evaluation but not for training: a single class, classes of one image.

    Raises:
        DataError: the data cannot be used; it has one `Problem` for each reason.
    """
    reading = reading or Reading()
    notes = Notes()
    main = _opened(training, reading)
    found = _read_all(main, validation, test, reading, notes)
    if for_training:
        classes = tuple(sorted(found.counts("train") or found.counts(None)))
        _check_classes(found, main.shown, notes)
    else:
        classes = tuple(sorted({name for record in found.records for name in record.labels}))
        if not classes:
            notes.problem(main.shown, "holds no labelled image")
    label_of = {name: label for label, name in enumerate(classes)}
    several = found.several and any(len(record.labels) != 1 for record in found.records)
    samples = tuple(
        _sample(record, label_of, several=several)
        for record in found.records
        if several or (record.labels and record.labels[0] in label_of)
    )
    if several:
        notes.say(_cardinality(main.shown, [len(sample.labels) for sample in samples]))
    dataset = Dataset(
        name=dataset_name(training),
        root=main.shown,
        classes=classes,
        samples=samples,
        bad=tuple(notes.bad),
        warnings=notes.warnings(),
        understood=tuple(notes.understood),
    )
    if notes.problems:
        raise IndexRefused(_refusal(main, notes.problems, for_training), notes.problems, dataset)
    return dataset


def _cardinality(shown: str, counts: Sequence[int]) -> str:
    """Return a sentence with the number of labels per image."""
    mean = sum(counts) / max(len(counts), 1)
    return f"{shown}: images have {min(counts, default=0)} to {max(counts, default=0)} labels, {mean:.2f} on average"


class IndexRefused(DataError):
    """Raised for data that cannot be used; `listed` has the samples that could be listed."""

    def __init__(self, message: str, problems: Sequence[Problem], listed: Dataset) -> None:
        super().__init__(message, problems)
        self.listed = listed


def _sample(record: Record, label_of: Mapping[str, int], *, several: bool) -> Sample:
    labels = tuple(sorted({label_of[name] for name in record.labels if name in label_of}))
    return Sample(
        id=record.id,
        file=record.file,
        target=labels if several else labels[0],
        split=record.split,
        group=record.group,
        weight=record.weight,
    )


@dataclass(frozen=True)
class _Opened:
    """An opened location and its format."""

    location: Location
    place: Place
    source: Source

    @property
    def shown(self) -> str:
        return self.place.shown


def _opened(location: Location, reading: Reading) -> _Opened:
    place = open_place(location, reading)
    return _Opened(location, place, source_of(place, reading))


def _refusal(main: _Opened, problems: Sequence[Problem], for_training: bool) -> str:
    expected = main.source.expected(main.shown)
    use = "cannot be trained on" if for_training else "cannot be measured on"
    said = f"{main.shown}: {use}, {plural(len(problems), 'problem')}."
    # Whether a table lies beside the images is not in question where a column of it is missing.
    of_columns = main.source.name == "images with a table" and all("column" in problem.message for problem in problems)
    return said if of_columns else f"{said} Expected {expected}."


@dataclass
class _Found:
    """The samples of all locations."""

    records: list[Record]
    classes: dict[Split | None, tuple[str, ...]]
    places: dict[Split | None, str]
    several: bool

    def counts(self, split: Split | None) -> dict[str, int]:
        """Count the images of each class of one split, including classes without images."""
        return self._counted()[split]

    def splits(self) -> list[Split | None]:
        return list(dict.fromkeys([*self.places, *(record.split for record in self.records)]))

    def _counted(self) -> Mapping[Split | None, dict[str, int]]:
        found: dict[Split | None, Counter[str]] = defaultdict(Counter)
        for split, names in self.classes.items():
            found[split].update(dict.fromkeys(names, 0))
        for record in self.records:
            found[record.split].update(record.labels)
        counted: dict[Split | None, dict[str, int]] = defaultdict(dict)
        counted.update({split: dict(sorted(counts.items())) for split, counts in found.items()})
        return counted


def _read_all(main: _Opened, validation: Location | None, test: Location | None, reading: Reading, notes: Notes) -> _Found:
    """Read the training data, and the separate validation and test data."""
    listing = _listed(main, reading, notes)
    found = _Found(list(listing.records), dict(listing.classes), dict(listing.places), listing.several)
    separate: tuple[tuple[Split, Location | None], ...] = (("val", validation), ("test", test))
    for split, location in separate:
        if location is None:
            continue
        try:
            other = _opened(location, reading)
        except DataError as error:
            notes.problem(str(location), error.message.partition(": ")[2] or error.message)
            continue
        if split in found.splits():
            notes.problem(
                main.shown, f"two sets for {split}: {found.places[split]} inside and {other.shown} given separately; give one"
            )
        _add(found, _listed(other, reading, notes), split, other, main, notes)
    # With separate test data but no validation data, a validation set is still to be split from the training data.
    if "val" in found.splits() and None in found.splits():
        _rename_split(found, None, "train")
    found.records[:] = _with_unique_ids(found.records)
    _unite_spellings(found, notes)
    return found


def _listed(opened: _Opened, reading: Reading, notes: Notes) -> Listing:
    for sentence in opened.place.tree.remarks:
        notes.say(sentence)
    listing = opened.source.read(opened.place, reading, notes)
    if opened.source.name == "class folders" and opened.place.focus is None:
        _say_spreadsheets(opened, notes, labelled=bool(listing.records))
    if opened.source.name != "class folders" and listing.records:
        notes.say(f"{opened.shown} was read as {opened.source.name}")
    return listing


def _say_spreadsheets(opened: _Opened, notes: Notes, *, labelled: bool) -> None:
    """Say that a spreadsheet beside the images is not read; it is a problem where nothing else labels them."""
    whole = opened.place.tree.root()
    root = without_wrapping(whole, Reading())
    files = [node for folder in ([whole] if root is whole else [whole, root]) for node in folder.files]
    for node in files:
        if node.suffix in SPREADSHEETS and labelled:
            notes.left_out.append(
                f"{printable(node.path)} was left out: spreadsheets are not read; if it contains labels, save it as CSV (UTF-8)"
            )
        elif node.suffix in SPREADSHEETS:
            notes.problem(shown_path(opened.place.tree, node.path), NO_SPREADSHEETS)


def _add(found: _Found, listing: Listing, split: Split, other: _Opened, main: _Opened, notes: Notes) -> None:
    """Add the samples of a separate location as one split."""
    if not listing.places and not listing.records:  # its problem is noted
        return
    if any(name is not None for name in listing.places):
        notes.problem(other.shown, f"has splits of its own, but is given as {split} data; give the folder of one split")
    above = _seen_from(main, other)
    found.records += [replace(record, id=f"{above}{record.id}", split=split) for record in listing.records]
    found.classes[split] = tuple(sorted({name for names in listing.classes.values() for name in names}))
    found.places[split] = other.shown
    found.several = found.several or listing.several


def _seen_from(main: _Opened, other: _Opened) -> str:
    """Return the prefix for the ids of another location's samples: its relative path, or its name."""
    if main.place.local is None or other.place.local is None:
        return f"{other.place.tree.name}/"
    here, there = (Path(opened.place.local or ".").resolve() for opened in (main, other))
    return printable(os.path.relpath(there, here)).replace(os.sep, "/") + "/"


def _rename_split(found: _Found, old: Split | None, new: Split) -> None:
    found.records[:] = [replace(record, split=new) if record.split == old else record for record in found.records]
    names = (*found.classes.get(new, ()), *found.classes.pop(old, ()))
    found.classes[new] = tuple(sorted(set(names)))
    found.places.setdefault(new, found.places.pop(old, ""))


def _with_unique_ids(records: Sequence[Record]) -> list[Record]:
    """Return the records with unique ids. A table may name a file in several rows, each of which is a sample."""
    seen: Counter[str] = Counter()
    unique = []
    for record in records:
        seen[record.id] += 1
        unique.append(record if seen[record.id] == 1 else replace(record, id=f"{record.id}#{seen[record.id]}"))
    return unique


def _unite_spellings(found: _Found, notes: Notes) -> None:
    """Make class names equal that differ only in the Unicode encoding of accents or in spaces around them; other names stay."""
    names = {name for names in found.classes.values() for name in names} | {name for r in found.records for name in r.labels}
    spelled: dict[str, list[str]] = defaultdict(list)
    for name in names:
        spelled[_with_plain_blanks(name)].append(name)
    several = {united: sorted(spellings) for united, spellings in spelled.items() if len(spellings) > 1}
    spaced = {
        united: spellings
        for united, spellings in several.items()
        if len({unicodedata.normalize("NFC", name) for name in spellings}) > 1
    }
    encoded = sorted(printable(united) for united in several.keys() - spaced.keys())
    if encoded:
        notes.say(f"class names that differ only in how accents are encoded are one class: {natural_list(encoded)}")
    for united, spellings in sorted(spaced.items()):
        shown = natural_list(map(repr, spellings))
        if {unicodedata.normalize("NFC", name).strip() for name in spellings} == {united}:
            notes.left_out.append(f"the labels {shown} differ only in the spaces around them; all are {united!r} now")
        else:
            notes.left_out.append(f"the labels {shown} differ only in invisible characters; all are {united!r} now")
    kept = sorted(
        name
        for spellings in spelled.values()
        for name in spellings
        if len(spellings) == 1 and name.strip() and name != name.strip()
    )
    if kept:
        notes.left_out.append(f"class names with spaces around them, kept as they are given: {natural_list(map(repr, kept))}")
    unseen = sorted(
        name
        for united, spellings in spelled.items()
        for name in spellings
        if len(spellings) == 1 and unicodedata.normalize("NFC", name).strip() != united
    )
    if unseen:
        notes.left_out.append(f"class names with invisible characters, kept as they are given: {natural_list(map(repr, unseen))}")
    renamed = {name: united for united, spellings in several.items() for name in spellings}
    if not renamed:
        return
    found.records[:] = [
        replace(record, labels=tuple(dict.fromkeys(renamed.get(name, name) for name in record.labels)))
        for record in found.records
    ]
    found.classes.update({split: tuple(sorted({renamed.get(n, n) for n in names})) for split, names in found.classes.items()})


_BLANKS = dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F], " ")  # non-breaking spaces and spaces of other widths
_INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0x2060, 0xFEFF])  # joiners are no part of these: some scripts need them


def _with_plain_blanks(name: str) -> str:
    """Return a class name without characters of no width, with plain spaces, and without spaces around it."""
    return unicodedata.normalize("NFC", name).translate(_BLANKS | _INVISIBLE).strip()


def _check_classes(found: _Found, shown: str, notes: Notes) -> None:
    """Note problems and warnings about the classes of each split and their counts."""
    splits = found.splits()
    key: Split | None = "train" if "train" in splits else None
    if key not in splits:
        if not notes.problems and found.records:
            notes.problem(shown, "nothing to train on: all of it is for validation or testing")
        return
    train, place = found.counts(key), found.places.get(key, "")
    _check_names(found, place, notes)
    _check_number_of_classes(found, train, place, notes)
    first_alone = next((name for name, count in train.items() if count == 1), None)
    unreadable = _unreadable_by_folder(notes)
    for name, count in train.items():
        if not count:
            unusable = _unusable(unreadable.get(f"{place}/{printable(name)}", ()))
            notes.problem(_inside(place, name), f"class {name!r} has no images{unusable}. Add some, or remove the folder")
        elif count == 1 and "val" not in splits and found.several:
            notes.left_out.append(
                f"{place}: only 1 image has the label {name!r}, so it can be trained on or tested on, but not both"
            )
        elif count == 1 and "val" not in splits:
            hint = _separator_hint(train) if name == first_alone else ""
            notes.problem(
                _inside(place, name),
                f"class {name!r} has 1 image; it takes at least 2, one to train on and one to validate on (a cross-validation "
                f"takes 3){hint}",
            )
    others: tuple[Split, ...] = ("val", "test")
    for split in others:
        if split in splits:
            _compare_classes(split, found.counts(split), train, found.places.get(split, place), notes)


def _separator_hint(names: Iterable[str]) -> str:
    """Return advice if class names look like several labels each; else an empty text."""
    found = forgotten_separator(names)
    if found is None:
        return ""
    return f". If {found[1][0]!r} is several labels of one image: {how_to_separate(found[0])}"


def _check_names(found: _Found, place: str, notes: Notes) -> None:
    """Note classes whose names cannot be distinguished by readers, or cannot be displayed."""
    for split in found.splits():
        spelled: dict[str, list[str]] = defaultdict(list)
        for name in found.counts(split):
            spelled[same_class(name)].append(name)
            if (why := problem_of_class_name(name)) is not None:
                notes.problem(found.places.get(split, place), f"a class name that {why}: '{printable(name)}'")
        for names in spelled.values():
            if len(names) > 1:
                same = " and ".join(repr(name) for name in names)
                notes.problem(
                    found.places.get(split, place),
                    f"classes {same} differ only in case, spaces or accent encoding; merge or rename them",
                )


def _inside(place: str, name: str) -> str:
    """Return the location of a class: its folder, or the table that contains it."""
    return place if place.lower().endswith(tuple(SUFFIXES)) else f"{place}/{printable(name)}"


def _unreadable_by_folder(notes: Notes) -> Mapping[str, Sequence[BadImage]]:
    """Return the images that cannot be read by the folders that they are in, at any depth."""
    found: dict[str, list[BadImage]] = defaultdict(list)
    for image in notes.bad:
        folder = image.where
        while "/" in folder:
            folder = folder.rpartition("/")[0]
            found[folder].append(image)
    return found


def _unusable(bad: Sequence[BadImage]) -> str:
    """Return the contents of a folder without readable images, in brackets."""
    if not bad:
        return ""
    others = f"; and {len(bad) - 1:,} more" if len(bad) > 1 else ""
    return f" ({printable(Path(bad[0].where).name)}: {bad[0].reason}{others})"


def _check_number_of_classes(found: _Found, train: Mapping[str, int], place: str, notes: Notes) -> None:
    if not train and not notes.problems:
        notes.problem(place, "no class folders found")
    if len(train) != 1 or found.several:
        return
    ((name, count),) = train.items()
    notes.problem(place, f"only one class, {name!r} with {plural(count, 'image')}; it takes at least two.")


def _compare_classes(split: str, counts: Mapping[str, int], train: Mapping[str, int], place: str, notes: Notes) -> None:
    for name in sorted(set(counts) - set(train)):
        if counts[name]:
            n_images, known = plural(counts[name], "image"), did_you_mean(name, sorted(train))
            notes.problem(_inside(place, name), f"class {name!r} with {n_images} is not among the training classes.{known}")
    missing = [name for name in sorted(train) if not counts.get(name)]
    if not any(counts.values()):
        notes.problem(place, f"the {split} data has no images in class folders")
    elif missing:
        notes.left_out.append(unmeasured(split, missing))
