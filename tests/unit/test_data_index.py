"""A folder of images → classes and samples, or every reason why not."""

from __future__ import annotations

import cProfile
import os
import unicodedata
from pathlib import Path

import pytest
from folders import encoded, path_of, write_classes

from finetune.data.dataset import Dataset
from finetune.data.index import index_dataset
from finetune.data.reading import Reading
from finetune.errors import DataError
from finetune.messages import natural_list, plural, printable


def refusal(training: Path, validation: Path | None = None, test: Path | None = None) -> DataError:
    with pytest.raises(DataError) as caught:
        index_dataset(training, validation, test)
    return caught.value


def problems(error: DataError) -> dict[str, str]:
    assert len(error.problems) == len({problem.where for problem in error.problems}), error
    return {Path(problem.where).name: problem.message for problem in error.problems}


def names(dataset: Dataset) -> list[tuple[str, str, str | None]]:
    return [(sample.id, dataset.classes[sample.target], sample.split) for sample in dataset.samples]


# -------------------------------------------------------------------------------------------------------------- layouts


def test_class_folders_become_classes_in_sorted_order_and_samples_without_a_split(tmp_path: Path) -> None:
    dataset = index_dataset(write_classes(tmp_path / "flowers", {"rose": 2, "daisy": 3, "10": 2, "2": 2}))
    assert dataset.classes == ("10", "2", "daisy", "rose")
    assert dataset.counts() == {"all": {"10": 2, "2": 2, "daisy": 3, "rose": 2}}
    assert names(dataset)[:2] == [("10/0.png", "10", None), ("10/1.png", "10", None)]
    assert dataset.bad == ()
    assert dataset.warnings == ()


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Valid", "Test"),
        ("TRAIN", "validation", "test"),
        ("training", "validation", "testing"),
    ],
)
def test_split_folders_inside_are_found_in_any_case(tmp_path: Path, train: str, val: str, test: str) -> None:
    for folder, n_images in ((train, 3), (val, 2), (test, 1)):
        write_classes(tmp_path / folder, {"a": n_images, "b": n_images})
    dataset = index_dataset(tmp_path)
    assert dataset.counts() == {"train": {"a": 3, "b": 3}, "val": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}}
    assert len(dataset.of("val")) == 4
    assert path_of(dataset.of("val")[0]) == tmp_path / val / "a" / "0.png"


def test_a_validation_folder_of_its_own_makes_the_rest_training_images(tmp_path: Path) -> None:
    dataset = index_dataset(
        write_classes(tmp_path / "mine", {"a": 1, "b": 2}), write_classes(tmp_path / "theirs", {"a": 1, "b": 1})
    )
    assert dataset.counts() == {"train": {"a": 1, "b": 2}, "val": {"a": 1, "b": 1}}
    assert names(dataset)[-1] == ("../theirs/b/0.png", "b", "val")


def test_a_test_folder_of_its_own_leaves_the_rest_to_be_split(tmp_path: Path) -> None:
    dataset = index_dataset(
        write_classes(tmp_path / "mine", {"a": 2, "b": 2}), test=write_classes(tmp_path / "test", {"a": 1, "b": 1})
    )
    assert dataset.counts() == {"test": {"a": 1, "b": 1}, "all": {"a": 2, "b": 2}}


def test_labels_are_aligned_by_name_when_a_split_lacks_a_class(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 2, "b": 2, "c": 2})
    write_classes(tmp_path / "val", {"c": 1, "b": 1})
    dataset = index_dataset(tmp_path)
    assert [(dataset.classes[sample.target], path_of(sample).parent.name) for sample in dataset.of("val")] == [
        ("b", "b"),
        ("c", "c"),
    ]
    assert dataset.warnings == ("val: no images of 1 class, which it cannot measure: a",)


def test_nested_folders_belong_to_the_class_above_them(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 1, "a/2023": 1, "a/2024/may": 2, "b": 2})
    assert index_dataset(tmp_path).counts() == {"all": {"a": 4, "b": 2}}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert index_dataset(write_classes(tmp_path, {"train": 2, "plane": 2, "car": 2})).classes == ("car", "plane", "train")


def test_what_operating_systems_and_people_leave_behind_is_ignored_and_other_files_are_named(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 2, "b": 2, "__MACOSX": 3, ".git": 2, "a/.cache": 2})
    for junk in (".DS_Store", "Thumbs.db", "a/._0.png", "a/desktop.ini", "b/.hidden.jpg"):
        (tmp_path / junk).write_bytes(b"junk")
    for other in ("a/notes.txt", "b/labels.csv"):
        (tmp_path / other).write_bytes(b"text")
    (tmp_path / "README.md").write_bytes(b"text")
    dataset = index_dataset(tmp_path)
    assert dataset.counts() == {"all": {"a": 2, "b": 2}}
    (warning,) = dataset.warnings
    assert warning.startswith("2 files not named like an image, left out: ")
    assert "a/notes.txt" in warning
    assert "b/labels.csv" in warning


def test_images_in_formats_that_are_not_read_are_quarantined_with_what_to_do(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a" / "IMG_1.PSD").write_bytes(b"8BPS")
    (bad,) = index_dataset(tmp_path).bad
    assert (Path(bad.where).name, bad.reason) == ("IMG_1.PSD", "PSD files are not read; convert it to JPEG or PNG")


def test_accents_stored_in_two_ways_are_one_class(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {unicodedata.normalize("NFD", "café"): 2, "tea": 2})
    write_classes(tmp_path / "val", {unicodedata.normalize("NFC", "café"): 1, "tea": 1})
    dataset = index_dataset(tmp_path)
    assert dataset.classes == (unicodedata.normalize("NFC", "café"), "tea")
    assert dataset.counts()["val"] == {"café": 1, "tea": 1}


# ------------------------------------------------------------------------------------------------------------- refusals


def test_one_class_is_refused_with_its_count_and_an_example_of_the_layout(tmp_path: Path) -> None:
    error = refusal(write_classes(tmp_path / "flowers", {"rose": 3}))
    assert problems(error) == {"flowers": "only one class, 'rose' with 3 images; it takes at least two."}
    assert f"{tmp_path}/flowers/daisy/1.jpg" in error.message
    assert f"{tmp_path}/flowers/val/daisy/2.jpg" in error.message


def test_no_class_folders_are_refused(tmp_path: Path) -> None:
    assert problems(refusal(tmp_path))[tmp_path.name] == "no class folders found"


def test_images_beside_the_class_folders_are_refused_with_their_names(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 2, "b": 2})
    for number in range(7):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
    message = problems(refusal(tmp_path))[tmp_path.name]
    assert message == "7 images in no class folder, so without a label: 0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 2 more"


def test_an_empty_class_is_refused(tmp_path: Path) -> None:
    error = refusal(write_classes(tmp_path, {"a": 2, "b": 2, "c": 0}))
    assert problems(error) == {"c": "class 'c' has no images. Add some, or remove the folder"}


def test_a_single_image_is_refused_only_where_it_would_have_to_be_split(tmp_path: Path) -> None:
    training = write_classes(tmp_path / "t", {"a": 1, "b": 2})
    assert "class 'a' has 1 image; it takes at least 2" in problems(refusal(training))["a"]
    validation = write_classes(tmp_path / "v", {"a": 1, "b": 1})
    assert index_dataset(training, validation).counts()["train"] == {"a": 1, "b": 2}


@pytest.mark.parametrize("second", ["Rose", "ROSE "])
def test_class_names_that_differ_only_in_case_are_refused(tmp_path: Path, second: str) -> None:
    error = refusal(write_classes(tmp_path, {"rose": 2, second: 2, "daisy": 2}))
    assert "differ only in case, spaces or accent encoding" in problems(error)[tmp_path.name]
    assert repr(second) in str(error)


def test_a_class_that_was_never_trained_on_is_refused_with_the_near_miss(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"rose": 2, "daisy": 2})
    write_classes(tmp_path / "val", {"Rose": 2, "daisy": 2})
    message = problems(refusal(tmp_path))["Rose"]
    assert message == "class 'Rose' with 2 images is not among the training classes. Did you mean 'rose'?"


def test_a_validation_folder_without_train_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path / "val", {"a": 2, "b": 2})
    write_classes(tmp_path / "test", {"a": 2, "b": 2})
    assert problems(refusal(tmp_path))[tmp_path.name] == "nothing to train on: all of it is for validation or testing"
    assert index_dataset(tmp_path, for_training=False).sizes() == {"val": 4, "test": 4}


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    for split in ("train", "val", "valid"):
        write_classes(tmp_path / split, {"a": 2, "b": 2})
    assert problems(refusal(tmp_path))[tmp_path.name] == (
        "val/ and valid/ both mean val; keep one of them, or say what each is with data.splits"
    )


def test_a_validation_folder_inside_and_another_given_are_refused(tmp_path: Path) -> None:
    for split in ("data/train", "data/val", "other"):
        write_classes(tmp_path / split, {"a": 2, "b": 2})
    assert "two sets for val: " in problems(refusal(tmp_path / "data", tmp_path / "other"))["data"]


def test_a_folder_with_images_beside_the_splits_is_refused_and_one_without_is_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_classes(tmp_path / split, {"a": 2, "b": 2})
    (tmp_path / "docs").mkdir()
    assert index_dataset(tmp_path).warnings == (f"{tmp_path}/docs: a folder without images beside train/, left out",)
    write_classes(tmp_path / "extra", {"a": 2})
    assert "2 images in a folder beside train/" in problems(refusal(tmp_path))["extra"]


def test_what_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path}/missing: no such folder or file. Give a folder with one folder" in refusal(tmp_path / "missing").message
    (tmp_path / "archive.zip").write_bytes(b"PK")
    assert problems(refusal(tmp_path / "archive.zip")) == {
        "archive.zip": "is neither a folder, a zip or tar, nor a table of images"
    }
    os.mkfifo(tmp_path / "pipe")
    assert "neither a folder nor a regular file" in refusal(tmp_path / "pipe").message


def test_control_characters_and_undecodable_bytes_in_class_names_are_refused(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 2, "b": 2, "c\nd": 2})
    undecodable = tmp_path / os.fsdecode(b"caf\xe9")
    write_classes(tmp_path, {undecodable.name: 2})
    error = refusal(tmp_path)
    assert [Path(problem.where).name for problem in error.problems] == ["c\\nd", "caf\\xe9"]
    assert str(error).encode("utf-8")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 2, "b": 0, "C": 2, "c": 2})
    write_classes(tmp_path / "val", {"a": 1, "z": 1})
    (tmp_path / "train" / "loose.jpg").write_bytes(b"x")
    error = refusal(tmp_path, None, tmp_path / "nowhere")
    told = " | ".join(problem.message for problem in error.problems)
    assert len(error.problems) == 5
    for part in (
        "no such folder",
        "in no class folder",
        "differ only in case",
        "class 'b' has no images",
        "class 'z' with 1 image",
    ):
        assert part in told
    assert "5 problems" in error.message


# ---------------------------------------------------------------------------------------------------------------- links


def linked(tmp_path: Path) -> Path:
    """Data whose classes, files and one nested folder are links to what lies elsewhere."""
    store = write_classes(tmp_path / "store", {"a": 2, "b": 2, "more": 3})
    root = tmp_path / "data"
    root.mkdir()
    (root / "a").symlink_to(store / "a")
    (root / "b").mkdir()
    (root / "b" / "0.png").symlink_to("../../store/b/0.png")
    (root / "b" / "1.png").symlink_to(store / "b" / "1.png")
    (root / "b" / "nested").symlink_to(store / "more")
    return root


def test_links_to_classes_files_and_folders_are_followed_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    root = linked(tmp_path)
    dataset = index_dataset(root)
    assert dataset.counts() == {"all": {"a": 2, "b": 5}}
    assert {path_of(sample).relative_to(root).parts[0] for sample in dataset.samples} == {"a", "b"}
    assert (dataset.bad, dataset.warnings) == ((), ())


def test_links_to_splits_are_followed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_classes(tmp_path / "store" / name, {"a": 2, "b": 2})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tmp_path / "store" / "one")
    (tmp_path / "data" / "val").symlink_to("../store/two")
    assert index_dataset(tmp_path / "data").sizes() == {"train": 4, "val": 4}


def test_a_link_to_a_folder_around_it_ends_the_walk_and_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    root = write_classes(tmp_path, {"a": 2, "b": 2})
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "self").symlink_to("self")
    (root / "b" / "broken.png").symlink_to(root / "nowhere.png")
    dataset = index_dataset(root)
    assert dataset.counts() == {"all": {"a": 2, "b": 2}}
    reasons = {Path(bad.where).name: bad.reason for bad in dataset.bad}
    assert reasons == {
        "loop": "a link to a folder that contains it, which could be followed without end",
        "self": "a link to a file that does not exist",
        "broken.png": "a link to a file that does not exist",
    }


def test_within_given_folders_no_link_leads_out(tmp_path: Path) -> None:
    root = linked(tmp_path)
    reading = Reading(roots=(root,))
    with pytest.raises(DataError) as caught:
        index_dataset(root, reading=reading)
    found = problems(caught.value)
    assert found["a"] == "a link that leads out of the folders that may be read; copy it there"
    assert "class 'b' has no images (0.png: a link that leads out of the folders" in found["b"]
    assert len(index_dataset(root, reading=Reading(roots=(root, tmp_path / "store"))).samples) == 7


# --------------------------------------------------------------------------------------------------------------- digest


def test_the_digest_depends_on_names_but_not_on_the_place(tmp_path: Path) -> None:
    here = index_dataset(write_classes(tmp_path / "x" / "data", {"a": 2, "b": 2}))
    there = index_dataset(write_classes(tmp_path / "y" / "data", {"a": 2, "b": 2}))
    more = index_dataset(write_classes(tmp_path / "z" / "data", {"a": 3, "b": 2}))
    assert here.digest == there.digest
    assert here.digest != more.digest


def test_counts_and_names_read_as_sentences() -> None:
    assert [plural(1, "image"), plural(2, "class"), plural(1200, "file")] == ["1 image", "2 classes", "1,200 files"]
    assert natural_list("abcdefg") == "a, b, c, d, e and 2 more"
    assert printable("tab\there\x1b[31m") == "tab\\there\\x1b[31m"


def test_the_clothing_photographs_are_found(photos: Path) -> None:
    counts = index_dataset(photos).counts()
    assert list(counts) == ["train", "val"]
    assert (sum(counts["train"].values()), sum(counts["val"].values())) == (3068, 341)
    assert counts["train"]["t-shirt"] == 795


def test_many_classes_of_one_image_take_time_that_grows_with_their_number(tmp_path: Path) -> None:
    """Counts function calls, which do not depend on the machine."""

    def n_calls(n_classes: int) -> int:
        root = tmp_path / str(n_classes)
        for number in range(n_classes):
            folder = root / f"class{number}"
            folder.mkdir(parents=True)
            (folder / "0.png").touch()  # listing does not read it
        counted = cProfile.Profile()
        with pytest.raises(DataError) as refused:
            counted.runcall(index_dataset, root)
        assert len(refused.value.problems) == n_classes  # each is named
        return sum(row.callcount for row in counted.getstats())

    n_calls(10)  # imports
    assert n_calls(400) < 3 * n_calls(200)


@pytest.mark.parametrize("blank", ["\u00a0", "\u200b", "\u2060", "\u202f", "\u00ad"])
def test_class_names_that_differ_in_characters_nobody_sees_are_one_class_and_it_is_said(blank: str, tmp_path: Path) -> None:
    spaced = blank in "\u00a0\u202f"
    plain, odd = ("red hat", f"red{blank}hat") if spaced else ("hat", f"hat{blank}")
    labels = [plain, odd, "cat", "cat"]
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encoded(f"image {number}"))
    rows = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
    (tmp_path / "labels.csv").write_text(f"file_name,label\n{rows}", encoding="utf-8")
    dataset = index_dataset(tmp_path / "labels.csv")
    assert dataset.classes == ("cat", plain)
    assert any("differ only in invisible characters" in warning for warning in dataset.warnings), dataset.warnings
    (tmp_path / "labels.csv").write_text(f"file_name,label\n{rows.replace(plain + chr(10), odd + chr(10))}", encoding="utf-8")
    alone = index_dataset(tmp_path / "labels.csv")
    assert alone.classes == ("cat", odd)
    assert any("invisible characters, kept as they are given" in warning for warning in alone.warnings), alone.warnings
