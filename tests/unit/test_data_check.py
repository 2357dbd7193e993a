"""Every file read once: what is unreadable is named and left out, what repeats is told."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from awkward import AWKWARD, READABLE, REFUSED
from folders import encoded, local_sample, path_of, write_classes

from finetune.bundle.image import decode_image, image_size
from finetune.data import check
from finetune.data.check import ImageFacts, advise_resize, check_images, image_facts
from finetune.data.dataset import Dataset
from finetune.data.index import index_dataset
from finetune.errors import DataError, ImageError
from finetune.progress import Progress


def with_truncated(root: Path, *names: str) -> Path:
    for name in names:
        data = encoded(name, (64, 48), "JPEG")
        (root / name).write_bytes(data[: len(data) // 2])
    return root


def test_a_sound_dataset_gets_digests_and_sizes_and_nothing_else_changes(tmp_path: Path) -> None:
    indexed = index_dataset(write_classes(tmp_path, {"a": 3, "b": 2}, (20, 16)))
    checked = check_images(indexed)
    assert [replace(sample, sha256="", size_px=None) for sample in checked.samples] == list(indexed.samples)
    assert {sample.size_px for sample in checked.samples} == {(20, 16)}
    assert [sample.sha256 for sample in checked.samples] == [
        hashlib.sha256(path_of(s).read_bytes()).hexdigest() for s in indexed.samples
    ]
    assert (checked.bad, checked.warnings) == ((), ())


def test_an_unreadable_file_is_left_out_and_named_with_its_reason(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 20, "b": 20})
    with_truncated(tmp_path, "a/cut.jpg")
    checked = check_images(index_dataset(tmp_path))
    assert checked.counts() == {"all": {"a": 20, "b": 20}}
    (bad,) = checked.bad
    assert Path(bad.where) == tmp_path / "a" / "cut.jpg"
    assert "damaged" in bad.reason


def test_the_verdict_is_the_decoders_for_every_awkward_kind_of_file(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 1, "b": 2})
    for name in AWKWARD:
        (tmp_path / "a" / f"{name}.png").write_bytes(AWKWARD[name][0])
    checked = check_images(index_dataset(tmp_path), max_bad_fraction=0.99)
    good = {path_of(sample).stem for sample in checked.samples if path_of(sample).stem in AWKWARD}
    assert good == set(READABLE)
    assert {Path(bad.where).stem for bad in checked.bad} == set(REFUSED)
    for sample in checked.samples:
        height, width = decode_image(path_of(sample).read_bytes()).shape[:2]
        assert sample.size_px == (width, height)


def test_a_file_that_may_not_be_read_is_left_out_like_a_damaged_one(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 20, "b": 20})
    dataset = index_dataset(tmp_path)
    (tmp_path / "a" / "0.png").unlink()  # between listing and reading
    (bad,) = check_images(dataset).bad
    assert bad.reason == "the file cannot be read: No such file or directory"


def test_one_bad_file_fails_the_dataset_when_asked_to(tmp_path: Path) -> None:
    with_truncated(write_classes(tmp_path, {"a": 20, "b": 20}), "b/cut.jpg")
    with pytest.raises(DataError, match=r"1 of 41 images cannot be read, and data.on_bad_image is fail") as caught:
        check_images(index_dataset(tmp_path), on_bad="fail")
    assert [problem.where for problem in caught.value.problems] == [f"{tmp_path}/b/cut.jpg"]


def test_more_bad_files_than_allowed_fail_the_dataset(tmp_path: Path) -> None:
    with_truncated(write_classes(tmp_path, {"a": 9, "b": 9}), "a/cut.jpg", "b/cut.jpg")
    dataset = index_dataset(tmp_path)
    assert len(check_images(dataset, max_bad_fraction=0.1).bad) == 2
    with pytest.raises(DataError, match=r"2 of 20 images cannot be read, more than data.max_bad_fraction 0.05 allows") as caught:
        check_images(dataset)
    assert len(caught.value.problems) == 2


def test_files_that_are_named_as_unread_formats_count_as_bad(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 9, "b": 9})
    for number in range(3):
        (tmp_path / "a" / f"{number}.heic").write_bytes(b"heic")
    with pytest.raises(DataError, match="3 of 21 images cannot be read"):
        check_images(index_dataset(tmp_path))


def test_hundreds_of_bad_files_are_counted_and_fifty_are_spelled_out(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 2, "b": 2})
    for number in range(120):
        (tmp_path / "a" / f"{number}.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError, match="120 of 124") as caught:
        check_images(index_dataset(tmp_path))
    assert len(caught.value.problems) == 51
    assert caught.value.problems[-1].message == "and 70 more"


def test_a_training_class_must_not_vanish_with_its_images(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 30, "b": 30, "c": 0})
    with_truncated(tmp_path, "c/1.jpg", "c/2.jpg")
    with pytest.raises(DataError, match="nothing is left of c") as caught:
        check_images(index_dataset(tmp_path))
    assert caught.value.problems[0].message == "none of its 2 images can be read"


def test_a_validation_set_must_not_vanish_with_its_images(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 30, "b": 30})
    write_classes(tmp_path / "val", {"a": 0})
    with_truncated(tmp_path, "val/a/1.jpg")
    with pytest.raises(DataError, match="nothing is left of val"):
        check_images(index_dataset(tmp_path))


def test_the_same_bytes_in_two_classes_are_a_warning_with_counts_and_an_example(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 3, "b": 3, "c": 2})
    shutil.copy(tmp_path / "a" / "0.png", tmp_path / "b" / "copy.png")
    shutil.copy(tmp_path / "a" / "1.png", tmp_path / "b" / "copy too.png")
    (warning,) = check_images(index_dataset(tmp_path)).warnings
    assert "2 photographs in more than one class (4 files with the same bytes): a and b (2)" in warning
    assert "a/0.png = b/copy.png" in warning


def test_the_same_bytes_in_train_and_val_are_a_warning_with_counts(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 3, "b": 3})
    write_classes(tmp_path / "val", {"a": 2, "b": 2})
    shutil.copy(tmp_path / "train" / "a" / "0.png", tmp_path / "val" / "a" / "leak.png")
    shutil.copy(tmp_path / "train" / "a" / "0.png", tmp_path / "val" / "a" / "leak again.png")
    (warning,) = check_images(index_dataset(tmp_path)).warnings
    assert warning.startswith("2 val files with the same bytes as a train file, so val metrics flatter the model")


def test_copies_within_one_class_of_one_split_are_no_warning(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 3, "b": 3})
    shutil.copy(tmp_path / "a" / "0.png", tmp_path / "a" / "copy.png")
    assert check_images(index_dataset(tmp_path)).warnings == ()


def test_the_result_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    with_truncated(write_classes(tmp_path, {"a": 40, "b": 40}), "a/cut.jpg", "b/cut.jpg")
    dataset = index_dataset(tmp_path)
    assert check_images(dataset, threads=1) == check_images(dataset, threads=7)


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    seen: list[Progress] = []
    check_images(index_dataset(write_classes(tmp_path, {"a": 70, "b": 70})), progress=seen.append)
    assert [(update.message, update.done, update.total) for update in seen] == [
        ("reading images", 140, 140),
        *(("checking images", n, 140) for n in (64, 128, 140)),
    ]
    assert {update.phase for update in seen} == {"preparing"}


def test_the_checked_digest_is_of_contents_and_not_of_names(tmp_path: Path) -> None:
    first = check_images(index_dataset(write_classes(tmp_path / "x" / "data", {"a": 2, "b": 2})))
    root = write_classes(tmp_path / "y" / "data", {"a": 2, "b": 2})
    (root / "a" / "0.png").rename(root / "a" / "renamed.png")
    second = check_images(index_dataset(root))
    (root / "a" / "renamed.png").write_bytes(encoded("other"))
    assert first.digest == second.digest
    assert check_images(index_dataset(root)).digest != second.digest


def test_bytes_that_decoded_before_are_not_decoded_again_but_are_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_classes(tmp_path / "data", {"a": 3, "b": 3})
    first = check_images(index_dataset(root), memory=tmp_path / "memory")
    decoded: list[bytes] = []
    monkeypatch.setattr(check, "image_size", lambda data: decoded.append(data) or image_size(data))
    assert check_images(index_dataset(root), memory=tmp_path / "memory") == first
    assert decoded == []
    (root / "a" / "new.png").write_bytes(encoded("new"))
    (root / "a" / "0.png").write_bytes(encoded("torn")[:60])
    again = check_images(index_dataset(root), memory=tmp_path / "memory", max_bad_fraction=0.5)
    assert [Path(bad.where).name for bad in again.bad] == ["0.png"]
    assert sorted(decoded) == sorted([encoded("new"), encoded("torn")[:60]])
    decoded.clear()
    check_images(index_dataset(root), memory=tmp_path / "memory", max_bad_fraction=0.5)
    assert decoded == [encoded("torn")[:60]]  # what is unreadable is judged anew each time


def test_torn_notes_are_no_verdict(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "data", {"a": 3, "b": 3})
    first = check_images(index_dataset(root), memory=tmp_path / "memory")
    (notes,) = (tmp_path / "memory").glob("readable-*")
    (files,) = (tmp_path / "memory").glob("files-*")
    files.unlink()
    notes.write_bytes(notes.read_bytes()[:-3] + b"\xff")
    assert check_images(index_dataset(root), memory=tmp_path / "memory") == first
    notes.write_bytes(b"".join(f"{sample.sha256} 1 1".encode() for sample in first.samples))
    assert check_images(index_dataset(root), memory=tmp_path / "memory") == first


# A JPEG is judged at an eighth of its size. That is honest only if damage shows there as it does at full size.


@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 90, "progressive": True}, {"quality": 60, "optimize": True}])
def test_a_reduced_decode_finds_the_damage_that_a_full_decode_finds(options: dict[str, int]) -> None:
    data = encoded("photograph", (203, 151), "JPEG", **options)
    rng = np.random.default_rng(0)
    verdicts = []
    for position in rng.integers(2, len(data), 300):
        flipped = bytearray(data)
        flipped[position] ^= int(rng.integers(1, 256))
        for damaged in (data[:position], bytes(flipped)):
            verdicts.append((decodes(damaged, 1), decodes(damaged, None)))
    assert all(reduced == full for reduced, full in verdicts)
    assert {full for _, full in verdicts} == {True, False}


def decodes(data: bytes, short_side_px: int | None) -> bool:
    try:
        decode_image(data, short_side_px=short_side_px)
    except ImageError:
        return False
    return True


# --------------------------------------------------------------------------------------------------------------- advice


def facts_of(sizes: list[tuple[int, int]]) -> ImageFacts:
    return image_facts([local_sample(Path(f"{number}.jpg"), 0, None, "", size) for number, size in enumerate(sizes)])


@pytest.mark.parametrize(
    ("sizes", "resize"),
    [
        ([(640, 480), (480, 640)] * 10, "crop"),
        ([(600, 600)] * 20, "crop"),
        ([(4000, 3000)] * 19 + [(5000, 500)], "crop"),
        ([(1920, 1000)] * 20, "squash"),
        ([(1080, 2340), (1170, 2532)] * 10, "squash"),
        ([(1920, 900), (900, 1920)] * 10, "letterbox"),
        ([(400, 400)] * 10 + [(1600, 400)] * 10, "letterbox"),
    ],
)
def test_images_are_framed_by_how_much_a_crop_would_hide_and_how_alike_their_shapes_are(
    sizes: list[tuple[int, int]], resize: str
) -> None:
    advice = advise_resize(facts_of(sizes))
    assert advice.resize == resize
    assert "times as long as wide" in advice.reason


def test_facts_are_the_quantiles_of_sizes() -> None:
    facts = facts_of([(200, 100)] * 50 + [(100, 100)] * 50)
    assert facts.n_images == 100
    assert facts.short_side_px == {"p5": 100.0, "p50": 100.0, "p95": 100.0}
    assert facts.elongation["p90"] == 2.0
    assert facts.aspect_spread == 2.0


def test_nothing_known_about_sizes_leaves_the_crop() -> None:
    assert advise_resize(facts_of([])).resize == "crop"


def test_the_clothing_photographs_are_all_readable_and_cropped(photos: Path) -> None:
    dataset = index_dataset(photos)
    some = Dataset("pictures", str(dataset.root), dataset.classes, dataset.samples[::10])
    checked = check_images(some)
    assert len(checked.samples) == len(some.samples) == 341
    assert advise_resize(image_facts(checked.samples)).resize == "crop"
