"""Decoded photographs on disk: the same pixels as ever, whole or absent, within a budget."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from folders import encoded, local_sample, path_of

from finetune.bundle.image import decode_image
from finetune.bundle.preprocess import Preprocess
from finetune.data import pixels
from finetune.data.augment import build_augment
from finetune.data.dataset import Sample
from finetune.data.loader import EvalLoader, TrainLoader
from finetune.data.pixels import PixelStore
from finetune.errors import ImageError
from finetune.storage.store import Store

SIDE_PX = 60  # decoded short side; a picture of 200×160 is decoded at a half, to 100×80×3 bytes
PICTURE_BYTES = 100 * 80 * 3 + 128


@pytest.fixture(autouse=True)
def small_pictures_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "LARGE_PX", 1000)


def photograph(folder: Path, name: str, size_px: tuple[int, int] = (200, 160), label: int = 0) -> Sample:
    data = encoded(name, size_px, "JPEG", quality=90)
    (folder / name).write_bytes(data)
    return local_sample(folder / name, label, "train", hashlib.sha256(data).hexdigest(), size_px)


def stored(store: PixelStore) -> list[Path]:
    return sorted(path for path in store.folder.rglob("*") if path.is_file())


def test_pixels_are_the_decoders_before_and_after_they_are_stored(tmp_path: Path) -> None:
    sample, store = photograph(tmp_path, "a.jpg"), PixelStore(Store(tmp_path / "store"))
    first, second = store.read(sample, SIDE_PX), store.read(sample, SIDE_PX)
    np.testing.assert_array_equal(first, decode_image(path_of(sample).read_bytes(), short_side_px=SIDE_PX))
    np.testing.assert_array_equal(second, first)
    assert (second.shape, second.dtype) == ((80, 100, 3), np.uint8)
    assert len(stored(store)) == 1


def test_a_second_read_does_not_open_the_photograph(tmp_path: Path) -> None:
    sample = photograph(tmp_path, "a.jpg")
    first = PixelStore(Store(tmp_path / "store")).read(sample, SIDE_PX)
    path_of(sample).unlink()
    np.testing.assert_array_equal(PixelStore(Store(tmp_path / "store")).read(sample, SIDE_PX), first)


def test_another_decoded_size_is_another_picture(tmp_path: Path) -> None:
    sample, store = photograph(tmp_path, "a.jpg"), PixelStore(Store(tmp_path / "store"))
    assert [store.read(sample, side).shape for side in (SIDE_PX, 150, SIDE_PX)] == [(80, 100, 3), (160, 200, 3), (80, 100, 3)]


@pytest.mark.parametrize("change", [{"size_px": (20, 16)}, {"size_px": None}, {"sha256": ""}])
def test_small_and_unchecked_images_are_not_stored(tmp_path: Path, change: dict[str, object]) -> None:
    sample, store = photograph(tmp_path, "a.jpg"), PixelStore(Store(tmp_path / "store"))
    store.read(replace(sample, **change), SIDE_PX)  # type: ignore[arg-type]
    assert stored(store) == []


def test_a_file_that_changed_since_it_was_checked_is_not_stored_under_the_old_content(tmp_path: Path) -> None:
    sample, store = photograph(tmp_path, "a.jpg"), PixelStore(Store(tmp_path / "store"))
    path_of(sample).write_bytes(encoded("another", (200, 160), "JPEG", quality=90))
    np.testing.assert_array_equal(store.read(sample, SIDE_PX), decode_image(path_of(sample).read_bytes(), short_side_px=SIDE_PX))
    assert stored(store) == []


def test_a_damaged_photograph_is_named(tmp_path: Path) -> None:
    sample = photograph(tmp_path, "a.jpg")
    path_of(sample).write_bytes(b"\xff\xd8\xff torn")
    with pytest.raises(ImageError, match=r"a\.jpg: the JPEG file is damaged"):
        PixelStore(Store(tmp_path / "store")).read(sample, SIDE_PX)


@pytest.mark.parametrize("damage", [lambda data: data[:50], lambda data: data[:-1000], lambda data: b"", lambda data: b"x" * 500])
def test_a_damaged_stored_picture_is_decoded_and_stored_again(tmp_path: Path, damage: object) -> None:
    sample, store = photograph(tmp_path, "a.jpg"), PixelStore(Store(tmp_path / "store"))
    first = store.read(sample, SIDE_PX)
    (path,) = stored(store)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))  # type: ignore[operator]
    np.testing.assert_array_equal(store.read(sample, SIDE_PX), first)
    assert path.read_bytes() == whole


def test_what_a_killed_writer_left_is_never_read(tmp_path: Path) -> None:
    sample, store = photograph(tmp_path, "a.jpg"), PixelStore(Store(tmp_path / "store"))
    first = store.read(sample, SIDE_PX)
    (path,) = stored(store)
    path.rename(path.with_name(f".{path.name}.half.tmp"))
    np.testing.assert_array_equal(store.read(sample, SIDE_PX), first)


def test_the_budget_is_kept_and_the_rest_is_decoded(tmp_path: Path) -> None:
    samples = [photograph(tmp_path, f"{number}.jpg") for number in range(6)]
    store = PixelStore(Store(tmp_path / "store", budget_bytes=3 * PICTURE_BYTES))
    for _ in range(2):
        for sample in samples:
            np.testing.assert_array_equal(
                store.read(sample, SIDE_PX), decode_image(path_of(sample).read_bytes(), short_side_px=SIDE_PX)
            )
    assert sum(path.stat().st_size for path in stored(store)) <= 3 * PICTURE_BYTES
    assert len(stored(store)) == 3


def test_pictures_that_no_run_uses_any_more_make_room_longest_unused_first(tmp_path: Path) -> None:
    old = [photograph(tmp_path, f"old-{number}.jpg") for number in range(3)]
    before = PixelStore(Store(tmp_path / "store", budget_bytes=3 * PICTURE_BYTES))
    for age, sample in enumerate(old):
        before.read(sample, SIDE_PX)
        path = before._path(sample, SIDE_PX)
        assert path is not None
        os.utime(path, (1000 + age, 1000 + age))
    after = PixelStore(Store(tmp_path / "store", budget_bytes=3 * PICTURE_BYTES))
    after.read(old[0], SIDE_PX)  # used again, so it stays
    new = photograph(tmp_path, "new.jpg")
    after.read(new, SIDE_PX)
    assert {path.stem for path in stored(after)} == {sample.sha256 for sample in (old[0], old[2], new)}


def test_a_full_disk_stops_storing_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sample, store = photograph(tmp_path, "a.jpg"), PixelStore(Store(tmp_path / "store"))
    monkeypatch.setattr(os, "replace", full)
    for _ in range(2):
        np.testing.assert_array_equal(
            store.read(sample, SIDE_PX), decode_image(path_of(sample).read_bytes(), short_side_px=SIDE_PX)
        )
    assert stored(store) == []


def test_many_threads_read_what_the_decoder_reads(tmp_path: Path) -> None:
    samples = [photograph(tmp_path, f"{number}.jpg") for number in range(8)]
    stores = [PixelStore(Store(tmp_path / "store", budget_bytes=5 * PICTURE_BYTES)) for _ in range(2)]
    expected = [decode_image(path_of(sample).read_bytes(), short_side_px=SIDE_PX) for sample in samples]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: stores[number % 2].read(samples[number // 2 % 8], SIDE_PX), range(320)))
    for number, rgb in enumerate(found):
        np.testing.assert_array_equal(rgb, expected[number // 2 % 8])


def test_batches_are_the_same_with_and_without_a_store(tmp_path: Path) -> None:
    samples = [photograph(tmp_path, f"{number}.jpg", label=number % 2) for number in range(7)]
    preprocess = Preprocess((32, 32), "crop", 1.0, "bicubic", (0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    augment = build_augment("default", None, preprocess)
    store = PixelStore(Store(tmp_path / "store"))
    for _ in range(2):  # decoding, then reading back
        pairs = list(zip(EvalLoader(samples, preprocess, 4), EvalLoader(samples, preprocess, 4, 2, store), strict=True))
        pairs += list(
            zip(
                TrainLoader(samples, augment, 4, seed=1),
                TrainLoader(samples, augment, 4, seed=1, threads=2, pixels=store),
                strict=True,
            )
        )
        assert len(pairs) == 4
        for plain, kept in pairs:
            for left, right in zip(plain, kept, strict=True):
                np.testing.assert_array_equal(left, right)
    assert len(stored(store)) == 7
