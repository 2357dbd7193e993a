"""What every format of labelled images must do, in whatever place it lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from formats import FORMATS, Contents, Format, images, tarred, zipped

from finetune.data.check import check_images
from finetune.data.dataset import Dataset
from finetune.data.index import index_dataset
from finetune.data.places import open_place
from finetune.data.reading import Reading
from finetune.data.sources import SOURCES, source_of
from finetune.data.split import read_split, split_dataset, write_split
from finetune.errors import DataError

PLAIN: Contents = {None: {"007": 4, "null": 3, "naïve cat": 5}}
SPLIT: Contents = {"train": {"a": 3, "b": 2}, "val": {"a": 1, "b": 2}, "test": {"b": 1}}
WITH_SPLITS = [name for name, written in FORMATS.items() if written.splits]
IN_FOLDERS = [name for name, written in FORMATS.items() if written.source != "a table" and name != "label studio, short"]


@pytest.fixture(params=FORMATS)
def written(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


def rows(dataset: Dataset) -> set[tuple[str | None, str, bytes]]:
    return {(sample.split, dataset.label_text(sample), sample.read()) for sample in dataset.samples}


def expected(contents: Contents) -> set[tuple[str | None, str, bytes]]:
    return {(one.split, one.label, one.data) for one in images(contents)}


def test_every_source_is_in_this_suite() -> None:
    assert {source.name for source in SOURCES} == {written.source for written in FORMATS.values()}
    assert len(SOURCES) >= 7
    assert len(FORMATS) >= 15


def test_a_format_is_recognised_by_its_source_first(written: Format, tmp_path: Path) -> None:
    place = open_place(written.write(tmp_path / "data", PLAIN), Reading())
    assert source_of(place).name == written.source


def test_it_lists_every_image_with_its_bytes_and_its_label_as_text(written: Format, tmp_path: Path) -> None:
    dataset = index_dataset(written.write(tmp_path / "data", PLAIN))
    assert dataset.classes == ("007", "naïve cat", "null")
    assert dataset.counts() == {"all": {"007": 4, "naïve cat": 5, "null": 3}}
    assert rows(dataset) == expected(PLAIN)
    assert len({sample.id for sample in dataset.samples}) == len(dataset.samples) == 12
    assert (dataset.warnings, dataset.bad) == ((), ())


@pytest.mark.parametrize("name", WITH_SPLITS)
def test_splits_of_its_own_are_kept(name: str, tmp_path: Path) -> None:
    dataset = index_dataset(FORMATS[name].write(tmp_path / "data", SPLIT))
    assert rows(dataset) == expected(SPLIT)
    assert dataset.sizes() == {"train": 5, "val": 3, "test": 1}


@pytest.mark.parametrize("pack", [zipped, tarred], ids=["zip", "tar.gz"])
@pytest.mark.parametrize("name", IN_FOLDERS)
def test_it_is_the_same_in_an_archive_with_a_folder_around(name: str, pack: object, tmp_path: Path) -> None:
    contents = SPLIT if FORMATS[name].splits else PLAIN
    folder = FORMATS[name].write(tmp_path / "data", contents)
    there, here = index_dataset(pack(folder)), index_dataset(folder)  # type: ignore[operator]
    assert rows(there) == rows(here) == expected(contents)
    assert there.classes == here.classes
    assert check_images(there).digest == check_images(here).digest


def test_listing_gives_the_same_twice(written: Format, tmp_path: Path) -> None:
    location = written.write(tmp_path / "data", PLAIN)
    assert index_dataset(location) == index_dataset(location)


def test_bad_images_are_named_by_the_check_and_the_rest_goes_on(written: Format, tmp_path: Path) -> None:
    location = written.write(tmp_path / "data", PLAIN)
    broken = next((path for path in sorted((tmp_path / "data").rglob("*.png"))), None)
    if broken is None:
        pytest.skip("the images are in the table")
    broken.write_bytes(broken.read_bytes()[:60])
    checked = check_images(index_dataset(location), max_bad_fraction=0.2)
    assert len(checked.samples) == 11
    assert [Path(bad.where) for bad in checked.bad] == [broken]


def test_a_recorded_split_fits_the_data_when_it_is_read_again(written: Format, tmp_path: Path) -> None:
    location = written.write(tmp_path / "data", PLAIN)
    split = split_dataset(check_images(index_dataset(location)))
    write_split(tmp_path / "split.csv", split)
    assert read_split(tmp_path / "split.csv", check_images(index_dataset(location))) == split


def test_the_same_images_in_any_format_are_the_same_data(tmp_path: Path) -> None:
    datasets = {
        name: split_dataset(check_images(index_dataset(written.write(tmp_path / name.replace(",", ""), PLAIN))))
        for name, written in FORMATS.items()
    }
    assert len({dataset.digest for dataset in datasets.values()}) == 1
    in_order = {tuple((s.sha256, s.split, s.target) for s in dataset.samples) for dataset in datasets.values()}
    assert len(in_order) == 1, "the same samples in the same order on the same sides"


def test_it_may_be_given_for_validation_beside_any_other(written: Format, tmp_path: Path) -> None:
    separate = written.write(tmp_path / "separate", {None: {"a": 2, "b": 1}})
    for name, other in FORMATS.items():
        training = other.write(tmp_path / name.replace(",", ""), {None: {"a": 3, "b": 3}})
        dataset = index_dataset(training, validation=separate)
        assert dataset.sizes() == {"train": 6, "val": 3}
        assert len({sample.id for sample in dataset.samples}) == 9


def test_what_is_judged_on_needs_neither_two_classes_nor_two_images(written: Format, tmp_path: Path) -> None:
    location = written.write(tmp_path / "data", {None: {"a": 1}})
    dataset = index_dataset(location, for_training=False)
    assert (dataset.classes, len(dataset.samples)) == (("a",), 1)
    with pytest.raises(DataError, match="cannot be trained on, 2 problems"):
        index_dataset(location)


@pytest.mark.parametrize("name", WITH_SPLITS)
def test_only_test_images_are_measured_and_not_trained_on(name: str, tmp_path: Path) -> None:
    location = FORMATS[name].write(tmp_path / "data", {"test": {"a": 2, "b": 1}})
    assert index_dataset(location, for_training=False).sizes() == {"test": 3}
    with pytest.raises(DataError, match="nothing to train on"):
        index_dataset(location)


def test_an_error_says_what_data_of_its_format_looks_like(written: Format, tmp_path: Path) -> None:
    location = written.write(tmp_path / "data", {None: {"a": 1}})
    with pytest.raises(DataError) as caught:
        index_dataset(location)
    place = open_place(location, Reading())
    assert source_of(place).expected(place.shown) in caught.value.message
    assert str(location) in caught.value.message


def test_what_is_not_there_is_one_sentence(written: Format, tmp_path: Path) -> None:
    location = written.write(tmp_path / "data", PLAIN)
    with pytest.raises(DataError, match="no such folder or file"):
        index_dataset(location.with_name(f"gone{location.suffix}"))


def test_names_that_only_look_different_are_refused(written: Format, tmp_path: Path) -> None:
    location = written.write(tmp_path / "data", {None: {"Rose": 2, "rose": 2}})
    with pytest.raises(DataError) as caught:
        index_dataset(location)
    assert any("'Rose' and 'rose' differ only in case" in problem.message for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("name", "pack"), [*((name, None) for name in FORMATS), *((name, zipped) for name in IN_FOLDERS), ("class folders", tarred)]
)
def test_spaces_around_a_class_name_are_told_and_kept_where_it_is_the_only_spelling(
    name: str, pack: Callable[[Path], Path] | None, tmp_path: Path
) -> None:
    def read(folder: str, contents: Contents) -> Dataset:
        location = FORMATS[name].write(tmp_path / folder, contents)
        return index_dataset(pack(location) if pack else location)

    alone = read("alone", {None: {"cat ": 3, "dog": 2}})
    assert alone.classes == ("cat ", "dog")
    assert "class names with spaces around them, kept as they are given: 'cat '" in alone.warnings
    both = read("both", {None: {"cat": 2, "cat ": 3, "dog": 2}})
    assert both.counts() == {"all": {"cat": 5, "dog": 2}}
    assert "the labels 'cat', 'cat ' differ only in the spaces around them; all are 'cat' now" in both.warnings


def test_several_tags_of_cvat_are_several_labels_and_an_image_without_tags_has_none(tmp_path: Path) -> None:
    location = FORMATS["cvat"].write(tmp_path / "data", PLAIN)
    file = location / "annotations.xml"
    text = file.read_text(encoding="utf-8")
    with_two = text.replace('<tag label="007"', '<tag label="outside"></tag><tag label="007"', 1)
    file.write_text(with_two, encoding="utf-8")
    dataset = index_dataset(location)
    assert sorted(len(sample.labels) for sample in dataset.samples) == [1] * 11 + [2]
    assert "outside" in dataset.classes


@pytest.mark.parametrize(
    ("start", "why"),
    [
        ('<!DOCTYPE a [<!ENTITY b "cat">]><annotations><image name="1.png"><tag label="&b;"/></image></annotations>', "DOCTYPE"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotations><image name="1.png"/></annotations>', "DOCTYPE"),
        ('<annotations><image name="1.png"><tag label="cat"></annotations>', "is not XML"),
        ('<annotations><image name="1.png"><tag label="&b;"/></image></annotations>', "is not XML"),
        ('<?xml version="1.0" encoding="cp-none"?><annotations><image name="1"/></annotations>', "is not XML"),
        ('<annotations><track id="0" label="cat"></track></annotations>', "export of a video"),
    ],
)
def test_unsafe_and_broken_xml_is_refused_with_its_file(start: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "annotations.xml").write_text(start, encoding="utf-8")
    with pytest.raises(DataError, match=rf"(?s)annotations\.xml: .*{why}"):
        index_dataset(tmp_path)


def test_a_spreadsheet_beside_images_is_named(tmp_path: Path) -> None:
    location = FORMATS["class folders"].write(tmp_path / "data", PLAIN)
    (location / "labels.xlsx").write_bytes(b"PK\x03\x04")
    (warning,) = index_dataset(location).warnings
    assert warning.startswith("labels.xlsx was left out: spreadsheets are not read; if it contains labels, save it as CSV")
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, image in enumerate(sorted(location.rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(image.read_bytes())
    (flat / "labels.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=r"labels\.xlsx: spreadsheets are not read\. Save the table as CSV"):
        index_dataset(flat)
