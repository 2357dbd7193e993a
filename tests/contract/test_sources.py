"""What every source of labelled images must do, whatever it is made of."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from folders import encoded

from finetune.data.check import check_images
from finetune.data.dataset import Dataset, Split
from finetune.data.index import index_dataset
from finetune.data.sources import SOURCES, Notes, Source, source_of
from finetune.data.split import read_split, split_dataset, write_split
from finetune.errors import DataError

Contents = Mapping[Split | None, Mapping[str, int]]  # split -> class -> how many images
PLAIN: Contents = {None: {"007": 4, "null": 3, "naïve cat": 5}}
SPLIT: Contents = {"train": {"a": 3, "b": 2}, "val": {"a": 1, "b": 2}, "test": {"b": 1}}


def write_folder(root: Path, contents: Contents) -> Path:
    for split, name, number, data in images(contents):
        folder = root / (split or "") / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(data)
    return root


def write_table(root: Path, contents: Contents, ending: str = "csv") -> Path:
    root.mkdir(parents=True)
    with open(root / f"labels.{ending}", "w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream, delimiter="," if ending == "csv" else "\t")
        rows.writerow(["file_name", "label", *(["split"] if None not in contents else [])])
        for split, name, number, data in images(contents):
            file = f"{split}-{name}-{number}.png"
            (root / file).write_bytes(data)
            rows.writerow([file, name, *([split] if split else [])])
    return root / f"labels.{ending}"


def images(contents: Contents) -> list[tuple[Split | None, str, int, bytes]]:
    return [
        (split, name, number, encoded(f"{split}/{name}/{number}"))
        for split, by_class in contents.items()
        for name, count in by_class.items()
        for number in range(count)
    ]


WRITERS: dict[str, Callable[[Path, Contents], Path]] = {"folder": write_folder, "table": write_table}
"""How each kind of place is made for this suite."""


@pytest.fixture(params=SOURCES, ids=lambda source: source.name)
def source(request: pytest.FixtureRequest) -> Source:
    return request.param  # type: ignore[no-any-return]


def made(source: Source, root: Path, contents: Contents = PLAIN) -> Path:
    return WRITERS[source.name](root, contents)


def rows(dataset: Dataset) -> set[tuple[str | None, str, bytes]]:
    return {(sample.split, dataset.label_text(sample), sample.read()) for sample in dataset.samples}


def test_every_source_is_in_this_suite_under_a_name_of_its_own() -> None:
    assert sorted(source.name for source in SOURCES) == sorted(WRITERS)
    assert len(SOURCES) >= 2


def test_a_source_recognises_its_own_kind_and_no_other(source: Source, tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        location = write(tmp_path / name, PLAIN)
        assert source.recognises(location) == (name == source.name)
        assert source_of(location).name == name


def test_it_lists_every_image_with_its_bytes_and_its_label_as_text(source: Source, tmp_path: Path) -> None:
    dataset = index_dataset(made(source, tmp_path / "data"))
    assert dataset.classes == ("007", "naïve cat", "null")
    assert dataset.counts() == {"all": {"007": 4, "naïve cat": 5, "null": 3}}
    assert rows(dataset) == {(split, name, data) for split, name, _, data in images(PLAIN)}
    assert len({sample.id for sample in dataset.samples}) == len(dataset.samples) == 12
    assert dataset.warnings == ()


def test_splits_of_its_own_are_kept(source: Source, tmp_path: Path) -> None:
    dataset = index_dataset(made(source, tmp_path / "data", SPLIT))
    assert rows(dataset) == {(split, name, data) for split, name, _, data in images(SPLIT)}
    assert dataset.sizes() == {"train": 5, "val": 3, "test": 1}


def test_listing_opens_no_image_and_gives_the_same_twice(source: Source, tmp_path: Path) -> None:
    location = made(source, tmp_path / "data")
    before = index_dataset(location)
    for path in (tmp_path / "data").rglob("*.png"):
        path.write_bytes(b"nothing that could be opened")
    assert index_dataset(location) == before


def test_bad_images_are_named_by_the_check_and_the_rest_goes_on(source: Source, tmp_path: Path) -> None:
    location = made(source, tmp_path / "data")
    broken = sorted((tmp_path / "data").rglob("*.png"))[0]
    broken.write_bytes(broken.read_bytes()[:60])
    checked = check_images(index_dataset(location), max_bad_fraction=0.2)
    assert len(checked.samples) == 11
    assert [Path(bad.where) for bad in checked.bad] == [broken]


def test_a_recorded_split_fits_the_data_when_it_is_read_again(source: Source, tmp_path: Path) -> None:
    location = made(source, tmp_path / "data")
    split = split_dataset(check_images(index_dataset(location)))
    write_split(tmp_path / "split.csv", split)
    assert read_split(tmp_path / "split.csv", check_images(index_dataset(location))) == split
    assert set(split.sizes()) == {"train", "val", "test"}


def test_the_same_images_from_any_source_are_the_same_data(tmp_path: Path) -> None:
    digests = {
        split_dataset(check_images(index_dataset(write(tmp_path / name, PLAIN)))).digest for name, write in WRITERS.items()
    }
    assert len(digests) == 1


def test_it_may_be_given_for_validation_beside_any_other(source: Source, tmp_path: Path) -> None:
    separate = made(source, tmp_path / "separate", {None: {"a": 2, "b": 1}})
    for name, write in WRITERS.items():
        training = write(tmp_path / name, {None: {"a": 3, "b": 3}})
        dataset = index_dataset(training, validation=separate)
        assert dataset.sizes() == {"train": 6, "val": 3}
        assert len({sample.id for sample in dataset.samples}) == 9


def test_what_is_judged_on_needs_neither_two_classes_nor_two_images(source: Source, tmp_path: Path) -> None:
    location = made(source, tmp_path / "data", {None: {"a": 1}})
    dataset = index_dataset(location, for_training=False)
    assert (dataset.classes, len(dataset.samples)) == (("a",), 1)
    with pytest.raises(DataError, match="cannot be trained on, 2 problems"):
        index_dataset(location)


def test_only_test_images_are_measured_and_not_trained_on(source: Source, tmp_path: Path) -> None:
    location = made(source, tmp_path / "data", {"train": {"a": 2}, "test": {"a": 1}})
    notes = Notes()
    assert set(source.read(location, tmp_path / "data", notes).splits) == {"train", "test"}
    assert not notes.problems


def test_an_error_says_what_data_of_its_kind_looks_like(source: Source, tmp_path: Path) -> None:
    location = made(source, tmp_path / "data", {None: {"a": 1}})
    with pytest.raises(DataError) as caught:
        index_dataset(location)
    assert source.expected(location) in caught.value.message
    assert str(location) in caught.value.message


def test_what_is_not_there_is_a_problem_and_no_traceback(source: Source, tmp_path: Path) -> None:
    location = made(source, tmp_path / "data")
    gone = location.with_name(f"gone{location.suffix}")
    with pytest.raises(DataError, match="no such folder"):
        index_dataset(gone)


def test_names_that_only_look_different_are_refused(source: Source, tmp_path: Path) -> None:
    location = made(source, tmp_path / "data", {None: {"Rose": 2, "rose": 2}})
    with pytest.raises(DataError) as caught:
        index_dataset(location)
    assert any("'Rose' and 'rose' differ only in case" in problem.message for problem in caught.value.problems)
