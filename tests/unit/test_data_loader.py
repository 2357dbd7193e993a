"""Batches: pure functions of position, whatever the threads and the start."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from folders import encoded, path_of, write_classes

from finetune.bundle.image import decode_image
from finetune.bundle.preprocess import Preprocess
from finetune.data.augment import build_augment, sample_seed
from finetune.data.dataset import Sample
from finetune.data.index import index_dataset
from finetune.data.loader import Batch, EvalLoader, TrainLoader
from finetune.data.order import epoch_order, steps_per_epoch, times_before
from finetune.data.parallel import ordered_map
from finetune.errors import ImageError

PREPROCESS = Preprocess((16, 16), "crop", 1.0, "bilinear", (0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
AUGMENT = build_augment("default", None, PREPROCESS)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    """23 images of two classes."""
    return index_dataset(write_classes(tmp_path_factory.mktemp("photos"), {"a": 12, "b": 11}, (40, 30))).samples


def same(left: Iterable[Batch], right: Iterable[Batch]) -> int:
    """How many batches there were, all equal to the last byte."""
    pairs = list(zip(left, right, strict=True))
    for one, other in pairs:
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    return len(pairs)


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_sees_every_image_once_in_order_as_it_will_be_served(samples: tuple[Sample, ...]) -> None:
    loader = EvalLoader(samples, PREPROCESS, batch_size=10)
    batches = list(loader)
    assert [len(batch.images) for batch in batches] == [10, 10, 3]
    assert len(loader) == 3
    images, indices = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    np.testing.assert_array_equal(indices, np.arange(23))
    assert (images.dtype, indices.dtype) == (np.uint8, np.int64)
    for image, sample in zip(images, samples, strict=True):
        np.testing.assert_array_equal(image, PREPROCESS.load_file(path_of(sample)))


def test_evaluation_may_be_repeated_with_any_number_of_threads(samples: tuple[Sample, ...]) -> None:
    one, five = EvalLoader(samples, PREPROCESS, 4, threads=1), EvalLoader(samples, PREPROCESS, 4, threads=5)
    assert same(one, one) == same(one, five) == 6


def test_no_samples_are_no_batches() -> None:
    assert list(EvalLoader((), PREPROCESS)) == []
    assert len(EvalLoader((), PREPROCESS)) == 0


# ------------------------------------------------------------------------------------------------------------- training


def test_a_training_batch_holds_the_views_that_its_position_says(samples: tuple[Sample, ...]) -> None:
    batches = list(TrainLoader(samples, AUGMENT, batch_size=8, seed=3, epoch=2))
    order = epoch_order(23, seed=3, epoch=2)
    assert [len(batch.images) for batch in batches] == [8, 8, 7]
    np.testing.assert_array_equal(np.concatenate([batch.indices for batch in batches]), order)
    for position, index in enumerate(order.tolist()):
        batch, row = batches[position // 8], position % 8
        rgb = decode_image(path_of(samples[index]).read_bytes(), short_side_px=AUGMENT.decode_short_side_px)
        np.testing.assert_array_equal(batch.images[row], AUGMENT(rgb, sample_seed(3, 2, index)))
        assert batch.indices[row] == index


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_the_number_of_threads_does_not_change_a_batch(samples: tuple[Sample, ...], threads: int) -> None:
    alone = TrainLoader(samples, AUGMENT, 5, seed=1, epoch=4, threads=1)
    assert same(alone, TrainLoader(samples, AUGMENT, 5, seed=1, epoch=4, threads=threads)) == 5


@pytest.mark.parametrize("start_step", [0, 1, 3, 4, 5])
def test_an_epoch_that_is_taken_up_at_any_step_goes_on_as_if_it_had_never_stopped(
    samples: tuple[Sample, ...], start_step: int
) -> None:
    whole = list(TrainLoader(samples, AUGMENT, 5, seed=1, epoch=1))
    rest = TrainLoader(samples, AUGMENT, 5, seed=1, epoch=1, start_step=start_step, threads=2)
    assert len(rest) == same(whole[start_step:], rest) == 5 - start_step


def test_epochs_and_seeds_shuffle_and_augment_differently(samples: tuple[Sample, ...]) -> None:
    def epoch(seed: int, epoch: int) -> tuple[list[int], dict[int, bytes]]:
        batches = list(TrainLoader(samples, AUGMENT, 23, seed=seed, epoch=epoch))
        (batch,) = batches
        views = {int(index): image.tobytes() for image, index in zip(batch.images, batch.indices, strict=True)}
        return batch.indices.tolist(), views

    orders, views = zip(epoch(0, 0), epoch(0, 1), epoch(1, 0), strict=True)
    assert len({tuple(order) for order in orders}) == 3
    for index in range(23):
        assert len({view[index] for view in views}) == 3


@pytest.mark.parametrize(
    ("n_samples", "batch_size", "steps"),
    [(10, 5, 2), (11, 5, 2), (12, 5, 3), (1, 5, 1), (4, 5, 1), (5, 5, 1), (6, 5, 1), (3, 1, 3), (1, 1, 1), (0, 5, 0)],
)
def test_no_batch_of_a_single_image_remains_unless_there_is_nothing_else(n_samples: int, batch_size: int, steps: int) -> None:
    assert steps_per_epoch(n_samples, batch_size) == steps


def test_the_image_that_one_epoch_leaves_out_is_another_in_the_next(samples: tuple[Sample, ...]) -> None:
    left_out = []
    for epoch in range(6):
        loader = TrainLoader(samples, AUGMENT, 11, seed=0, epoch=epoch)
        seen = {int(index) for batch in loader for index in batch.indices}
        assert [len(batch.images) for batch in loader] == [11, 11]
        left_out += list(set(range(23)) - seen)
    assert len(left_out) == 6
    assert len(set(left_out)) > 1


# --------------------------------------------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", ["eval", "train"])
def test_an_image_that_no_longer_decodes_stops_the_loop_and_is_named(tmp_path: Path, kind: str, threads: int) -> None:
    samples = index_dataset(write_classes(tmp_path, {"a": 6, "b": 6})).samples
    path_of(samples[7]).write_bytes(encoded("torn")[:60])
    eval_loader = EvalLoader(samples, PREPROCESS, 3, threads)
    loader = eval_loader if kind == "eval" else TrainLoader(samples, AUGMENT, 3, seed=0, threads=threads)
    with pytest.raises(ImageError, match=r"b/1\.png: the PNG file is .*damaged"):
        list(loader)


def loader_threads() -> int:
    return sum(thread.name.startswith("images") for thread in threading.enumerate())


def test_a_loop_that_is_left_early_leaves_no_threads_behind(samples: tuple[Sample, ...]) -> None:
    before = loader_threads()
    for batch in TrainLoader(samples, AUGMENT, 2, seed=0, threads=4):
        assert len(batch.images) == 2
        assert loader_threads() > before
        break
    assert loader_threads() == before


def test_work_runs_ahead_of_the_reader_by_no_more_than_asked() -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def note(item: int) -> int:
        with lock:
            begun.append(item)
        return item * item

    results = ordered_map(note, range(100), threads=4, ahead=6)
    for taken in range(100):
        assert next(results) == taken * taken
        assert len(begun) <= taken + 1 + 6
    assert list(results) == []
    assert sorted(begun) == list(range(100))


def test_results_come_in_order_also_when_later_items_are_done_first() -> None:
    second_done = threading.Event()

    def slow_first(item: int) -> int:
        if item == 0:
            assert second_done.wait(120)
        if item == 1:
            second_done.set()
        return item

    assert list(ordered_map(slow_first, range(5), threads=2, ahead=3)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("threads", "ahead"), [(0, 1), (1, 0)])
def test_a_map_without_threads_or_room_is_refused(threads: int, ahead: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        next(ordered_map(str, [1], threads=threads, ahead=ahead))


def test_real_photographs_load_the_same_with_any_threads(photos: Path) -> None:
    preprocess = Preprocess((96, 96), "crop", 0.875, "bicubic", (255, 255, 255), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    samples = index_dataset(photos).of("train")[::100]
    augment = build_augment("default", None, preprocess)
    assert same(EvalLoader(samples, preprocess, 8), EvalLoader(samples, preprocess, 8, threads=3)) == 4
    assert same(TrainLoader(samples, augment, 8, seed=0), TrainLoader(samples, augment, 8, seed=0, threads=3)) == 4


def test_sampling_shows_every_class_equally_often_and_every_image_of_a_class() -> None:
    classes = np.repeat([0, 1, 2], [80, 15, 5])
    order = epoch_order(100, seed=3, epoch=1, classes=classes)
    assert len(order) == 100
    assert sorted(np.bincount(classes[order])) == [33, 33, 34]
    shown = np.bincount(order, minlength=100)
    for label in range(3):
        of_class = shown[classes == label]
        assert of_class.max() - of_class.min() <= 1
    assert np.array_equal(order, epoch_order(100, seed=3, epoch=1, classes=classes)), "a function of seed and epoch"
    assert set(order[classes[order] == 0]) != set(epoch_order(100, 3, 2, classes)[classes[epoch_order(100, 3, 2, classes)] == 0])


def test_an_image_that_comes_again_is_shown_in_another_view() -> None:
    order = np.array([4, 2, 4, 4, 2, 7])
    assert times_before(order).tolist() == [0, 0, 1, 2, 1, 0]
