"""The split: whose side an image is on is decided by its bytes and the seed alone."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from folders import encoded, local_sample, path_of, write_classes

from finetune.data.check import check_images
from finetune.data.dataset import Dataset, Sample
from finetune.data.files import LocalFile
from finetune.data.index import index_dataset
from finetune.data.split import leaked, read_split, recorded_sides, refuse_impossible_folds, split_dataset, write_split
from finetune.errors import DataChangedError, DataError


def dataset_of(root: Path, counts: dict[str, int]) -> Dataset:
    return check_images(index_dataset(write_classes(root, counts)))


def sides(dataset: Dataset) -> dict[str, str | None]:
    """Content → split."""
    return {sample.sha256: sample.split for sample in dataset.samples}


def test_every_class_is_divided_in_about_the_same_proportions(tmp_path: Path) -> None:
    split = split_dataset(dataset_of(tmp_path, {"a": 200, "b": 100, "c": 300}), val_fraction=0.2, test_fraction=0.1)
    for name, share in (("val", 0.2), ("test", 0.1)):
        for label, total in (("a", 200), ("b", 100), ("c", 300)):
            assert abs(split.counts()[name][label] / total - share) < 4 * (share * (1 - share) / total) ** 0.5


def test_two_images_are_one_to_train_and_one_to_validate_and_the_third_tests(tmp_path: Path) -> None:
    counts = split_dataset(dataset_of(tmp_path, {"a": 2, "b": 3, "c": 4})).counts()
    assert counts == {"train": {"a": 1, "b": 1, "c": 2}, "val": {"a": 1, "b": 1, "c": 1}, "test": {"a": 0, "b": 1, "c": 1}}


def test_the_split_is_the_same_again_and_another_one_with_another_seed(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {"a": 20, "b": 20})
    assert split_dataset(dataset, seed=1) == split_dataset(dataset, seed=1)
    assert sides(split_dataset(dataset, seed=1)) != sides(split_dataset(dataset, seed=2))


def test_neither_place_nor_names_nor_order_of_the_files_matter(tmp_path: Path) -> None:
    here = split_dataset(dataset_of(tmp_path / "x" / "data", {"a": 12, "b": 12}))
    root = write_classes(tmp_path / "y" / "data", {"a": 12, "b": 12})
    for number in range(12):
        (root / "a" / f"{number}.png").rename(root / "a" / f"{(number * 5) % 12}-renamed.png")
    moved = check_images(index_dataset(root))
    backwards = replace(moved, samples=moved.samples[::-1])
    assert sides(split_dataset(moved)) == sides(here)
    assert split_dataset(backwards) == split_dataset(moved)


def test_another_class_leaves_the_split_of_the_others_alone(tmp_path: Path) -> None:
    before = sides(split_dataset(dataset_of(tmp_path, {"a": 12, "b": 12})))
    after = sides(split_dataset(dataset_of(tmp_path, {"a": 12, "b": 12, "c": 12})))
    assert len(after) == 36
    assert {content: after[content] for content in before} == before


def test_files_with_the_same_bytes_are_on_one_side_also_when_they_are_in_two_classes(tmp_path: Path) -> None:
    root = write_classes(tmp_path, {"a": 10, "b": 10})
    for number in range(5):
        for copy in range(3):
            shutil.copy(root / "a" / f"{number}.png", root / "ab"[copy % 2] / f"copy-{number}-{copy}.png")
    split = split_dataset(check_images(index_dataset(root)), val_fraction=0.3, test_fraction=0.2)
    assert len(split.samples) == 35
    by_content: dict[str, set[str | None]] = {}
    for sample in split.samples:
        by_content.setdefault(sample.sha256, set()).add(sample.split)
    assert {len(splits) for splits in by_content.values()} == {1}
    assert all(count > 0 for counts in split.counts().values() for count in counts.values())


def test_a_class_of_copies_of_one_image_is_refused(tmp_path: Path) -> None:
    root = write_classes(tmp_path, {"a": 1, "b": 3})
    shutil.copy(root / "a" / "0.png", root / "a" / "copy.png")
    with pytest.raises(DataError, match="too few distinct images to split: a") as caught:
        split_dataset(check_images(index_dataset(root)))
    assert caught.value.problems[0].message.startswith("2 readable files of 1 distinct image")


def test_a_validation_set_of_ones_own_is_left_alone_and_nothing_else_is_cut(tmp_path: Path) -> None:
    training, validation = write_classes(tmp_path / "t", {"a": 10, "b": 10}), write_classes(tmp_path / "v", {"a": 1, "b": 1})
    dataset = check_images(index_dataset(training, validation))
    split = split_dataset(dataset, val_fraction=0.4, test_fraction=0.4)
    assert split.counts() == {"train": {"a": 10, "b": 10}, "val": {"a": 1, "b": 1}}
    assert [path_of(sample) for sample in split.of("val")] == [validation / "a" / "0.png", validation / "b" / "0.png"]


@pytest.mark.parametrize("layout", ["inside", "given"])
def test_with_only_a_test_set_of_ones_own_the_validation_set_is_cut(tmp_path: Path, layout: str) -> None:
    write_classes(tmp_path / "data" / "train", {"a": 10, "b": 10})
    if layout == "inside":
        write_classes(tmp_path / "data" / "test", {"a": 3, "b": 3})
        dataset = index_dataset(tmp_path / "data")
    else:
        dataset = index_dataset(tmp_path / "data" / "train", test=write_classes(tmp_path / "mine", {"a": 3, "b": 3}))
    split = split_dataset(check_images(dataset), val_fraction=0.2, test_fraction=0.4)
    counts = split.counts()
    assert counts["test"] == {"a": 3, "b": 3}
    assert all(counts["val"].values())
    assert all(counts["train"][name] + counts["val"][name] == 10 for name in "ab")
    assert {path_of(sample).parts[-3] for sample in split.of("test")} == {"test" if layout == "inside" else "mine"}


def test_a_written_split_is_read_back_the_same(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data", {'a "b", c': 8, "ünïcode": 8})
    (root / "ünïcode" / "line\nbreak.png").write_bytes((root / "ünïcode" / "0.png").read_bytes() + b" ")
    (root / "ünïcode" / os.fsdecode(b"caf\xe9.png")).write_bytes((root / "ünïcode" / "0.png").read_bytes() + b"  ")
    dataset = check_images(index_dataset(root))
    split = split_dataset(dataset)
    write_split(tmp_path / "split.csv", split)
    assert len(split.samples) == 18
    assert read_split(tmp_path / "split.csv", dataset) == split
    header, first = (tmp_path / "split.csv").read_bytes().split(b"\n")[:2]
    assert header == b"path,label,split,sha256,group"
    assert first.startswith(b'"a ""b"", c/')


def test_a_changed_dataset_does_not_fit_a_recorded_split(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data", {"a": 5, "b": 5})
    write_split(tmp_path / "split.csv", split_dataset(check_images(index_dataset(root))))
    (root / "a" / "0.png").rename(root / "b" / "moved.png")
    (root / "a" / "1.png").write_bytes((root / "a" / "1.png").read_bytes() + b" ")
    with pytest.raises(DataChangedError, match=r"the data changed since this run began\. Give another --run-dir") as caught:
        read_split(tmp_path / "split.csv", check_images(index_dataset(root)))
    assert {problem.where: problem.message for problem in caught.value.problems} == {
        "a/1.png": "has other bytes than when the split was recorded",
        "b/moved.png": "is in the dataset, but not in the recorded split",
        "a/0.png": "is in the recorded split, but no longer in the dataset",
    }


@pytest.mark.parametrize("text", ["", "path,label\n", "path,label,split,sha256\na,b,c\n", "path,label,split,sha256\na,b,dev,\n"])
def test_what_is_no_recorded_split_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(DataError, match="not a recorded split; expected the columns path,label,split,sha256,group"):
        read_split(tmp_path / "split.csv", Dataset("pictures", str(tmp_path), ("a",), (local_sample(tmp_path / "a", 0, None),)))


def test_a_split_of_an_earlier_release_without_groups_is_read(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data", {"a": 5, "b": 5})
    split = split_dataset(check_images(index_dataset(root)))
    rows = [f"{sample.id},{split.label_text(sample)},{sample.split},{sample.sha256}" for sample in split.samples]
    (tmp_path / "split.csv").write_text("\n".join(["path,label,split,sha256", *rows]) + "\n")
    assert read_split(tmp_path / "split.csv", check_images(index_dataset(root))) == split


def test_an_earlier_split_is_kept_for_its_images_wherever_they_are_now_and_only_new_ones_are_drawn(tmp_path: Path) -> None:
    before = split_dataset(dataset_of(tmp_path / "old", {"a": 30, "b": 30}), seed=9)
    write_split(tmp_path / "split.csv", before)
    (tmp_path / "old" / "a").rename(tmp_path / "old" / "moved")
    (tmp_path / "old" / "moved").rename(tmp_path / "old" / "a")
    for number in range(30, 60):
        (tmp_path / "old" / "a" / f"new-{number}.png").write_bytes(encoded(f"new {number}"))
    recorded = recorded_sides(tmp_path / "split.csv")
    after = split_dataset(check_images(index_dataset(tmp_path / "old")), seed=1, recorded=recorded)
    kept = {content: side for content, side in sides(after).items() if content in sides(before)}
    assert kept == sides(before)
    drawn = [sample.split for sample in after.samples if sample.sha256 not in sides(before)]
    assert len(drawn) == 30
    assert set(drawn) == {"train", "val", "test"}


def test_an_earlier_split_beside_validation_images_of_ones_own_is_refused(tmp_path: Path) -> None:
    training, validation = write_classes(tmp_path / "t", {"a": 3, "b": 3}), write_classes(tmp_path / "v", {"a": 1, "b": 1})
    with pytest.raises(DataError, match=r"data\.split_file has no effect"):
        split_dataset(check_images(index_dataset(training, validation)), recorded={"00": "train"})


def test_what_was_trained_on_is_found_in_validation_images_of_ones_own(tmp_path: Path) -> None:
    training, validation = write_classes(tmp_path / "t", {"a": 6, "b": 6}), write_classes(tmp_path / "v", {"a": 3, "b": 3})
    shutil.copy(training / "a" / "0.png", validation / "a" / "copy.png")
    dataset = split_dataset(check_images(index_dataset(training, validation)))
    assert leaked(dataset) == {"val": frozenset({"../v/a/copy.png"})}
    grouped = replace(
        dataset, samples=tuple(replace(s, group="one") if s.id in ("a/1.png", "../v/b/0.png") else s for s in dataset.samples)
    )
    assert leaked(grouped) == {"val": frozenset({"../v/a/copy.png", "../v/b/0.png"})}


def test_large_groups_that_spoil_the_shares_are_told(tmp_path: Path) -> None:
    samples = [
        replace(local_sample(tmp_path / f"{n}.png", n % 2, None, f"image {n}"), group=f"{n % 2}-{n // 50}") for n in range(100)
    ]
    dataset = Dataset("pictures", str(tmp_path), ("a", "b"), tuple(samples))
    split = split_dataset(dataset, val_fraction=0.05, test_fraction=0.0)
    assert any(told.startswith("val has 50% of the images") for told in split.warnings), split.warnings


def test_where_a_single_image_of_a_class_is_left_to_train_on_folds_are_proposed() -> None:
    def divided(**counts: int) -> tuple[str, ...]:
        samples = [
            local_sample(Path(f"{name}/{number}.png"), label, None, f"{name} {number}")
            for label, (name, count) in enumerate(counts.items())
            for number in range(count)
        ]
        return split_dataset(Dataset("photos", "my photos", tuple(counts), tuple(samples))).warnings

    (said,) = divided(cat=40, dog=30, newt=3)
    assert said.startswith("only 1 image is left to train on: newt (of 3)")
    assert said.endswith("finetune train 'my photos' --folds 3")
    (said,) = divided(cat=40, newt=2)
    assert said == "only 1 image is left to train on: newt (of 2): add images, or merge classes"
    assert divided(cat=40, dog=30) == ()


def test_impossible_folds_are_refused_from_the_listing_with_the_class_and_the_largest_number() -> None:
    def listed(*counts: int) -> Dataset:
        classes = tuple(f"class {label}" for label in range(len(counts)))
        pairs = [(label, at) for label, count in enumerate(counts) for at in range(count)]
        samples = tuple(Sample(f"{label}/{at}", LocalFile(Path(f"{label}/{at}")), label) for label, at in pairs)
        return Dataset("data", "data", classes, samples)

    refuse_impossible_folds(listed(9, 5), 5)
    with pytest.raises(DataError, match=r"class 'class 1' has 4 images.* The largest number that works is --folds 4;"):
        refuse_impossible_folds(listed(9, 4), 5)
    with pytest.raises(DataError, match=r"class 'class 1' has 2 images.* No number of folds works with fewer than 3"):
        refuse_impossible_folds(listed(9, 2), 3)
