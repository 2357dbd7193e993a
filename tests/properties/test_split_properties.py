"""What holds for the split of any dataset, whatever its sizes, copies and fractions."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest
from folders import local_sample, path_of
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.dataset import Dataset
from finetune.data.split import cut, deal, fold_datasets, split_dataset
from finetune.errors import DataError

ROOT = Path("/photos")

FRACTIONS = st.tuples(st.floats(0.01, 0.45), st.one_of(st.just(0.0), st.floats(0.01, 0.44)))


@st.composite
def datasets(draw: st.DrawFn) -> Dataset:
    """Two to four classes of two or more distinct images, some of them in several copies, in any order."""
    n_classes = draw(st.integers(2, 4))
    samples = []
    for label in range(n_classes):
        for number, copies in enumerate(draw(st.lists(st.integers(1, 4), min_size=2, max_size=25))):
            samples += [
                local_sample(ROOT / f"{label}/{number}-{copy}.png", label, None, f"{label}-{number}") for copy in range(copies)
            ]
    return Dataset("pictures", str(ROOT), tuple("abcd"[:n_classes]), tuple(draw(st.permutations(samples))))


@given(datasets(), FRACTIONS, st.integers(0, 2**32 - 1))
def test_a_split_keeps_every_image_once_on_one_side_and_every_class_in_train_and_val(
    dataset: Dataset, fractions: tuple[float, float], seed: int
) -> None:
    val_fraction, test_fraction = fractions
    split = split_dataset(dataset, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    assert Counter(path_of(sample) for sample in split.samples) == Counter(path_of(sample) for sample in dataset.samples)
    sides = defaultdict(set)
    for sample in split.samples:
        sides[sample.sha256].add(sample.split)
    assert all(len(splits) == 1 for splits in sides.values())
    counts = split.counts()
    assert all(count for count in counts["train"].values())
    assert all(count for count in counts["val"].values())
    if test_fraction > 0:
        for label, name in enumerate(dataset.classes):
            distinct = len({sample.sha256 for sample in dataset.samples if sample.target == label})
            assert distinct < 3 or counts["test"][name] > 0
    else:
        assert "test" not in counts


@given(st.lists(st.just(1), min_size=2, max_size=400), FRACTIONS)
def test_distinct_images_are_cut_to_within_one_of_the_fractions(sizes: list[int], fractions: tuple[float, float]) -> None:
    val_fraction, test_fraction = fractions
    counts = Counter(cut(sizes, val_fraction, test_fraction))
    for name, fraction in (("val", val_fraction), ("test", test_fraction)):
        assert abs(counts[name] - fraction * len(sizes)) <= 1.0
    assert counts["train"] >= 1


@given(datasets(), st.integers(0, 2**32 - 1), st.randoms())
def test_the_order_of_files_has_no_influence(dataset: Dataset, seed: int, random: object) -> None:
    shuffled = list(dataset.samples)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = Dataset("pictures", str(dataset.root), dataset.classes, tuple(shuffled))
    assert split_dataset(again, seed=seed) == split_dataset(dataset, seed=seed)


@st.composite
def foldable(draw: st.DrawFn) -> tuple[Dataset, int]:
    """A split dataset, perhaps with test images of its own, and a number of folds that all its classes allow."""
    n_folds = draw(st.integers(2, 6))
    samples = []
    n_classes = draw(st.integers(1, 4))
    for label in range(n_classes):
        sizes = draw(st.lists(st.integers(1, 3), min_size=max(n_folds, 4), max_size=20))
        for number, copies in enumerate(sizes):
            samples += [
                local_sample(ROOT / f"{label}/{number}-{copy}.png", label, None, f"{label}-{number}") for copy in range(copies)
            ]
    samples += [
        local_sample(ROOT / f"test/{number}.png", 0, "test", f"test-{number}") for number in range(draw(st.integers(0, 3)))
    ]
    dataset = Dataset("pictures", str(ROOT), tuple("abcd"[:n_classes]), tuple(draw(st.permutations(samples))))
    return split_dataset(dataset, val_fraction=0.2, test_fraction=0.0), n_folds


@given(foldable(), st.floats(0.05, 0.4), st.integers(0, 2**32 - 1))
def test_every_image_of_the_pool_is_held_out_once_and_no_copy_is_on_two_sides(
    given_folds: tuple[Dataset, int], val_fraction: float, seed: int
) -> None:
    dataset, n_folds = given_folds
    pool = Counter(path_of(sample) for sample in dataset.samples if sample.split != "test")
    folds = fold_datasets(dataset, n_folds, val_fraction=val_fraction, seed=seed)
    assert len(folds) == n_folds
    assert Counter(path_of(sample) for fold in folds for sample in fold.of("test")) == pool
    for fold in folds:
        assert Counter(path_of(sample) for sample in fold.samples) == pool, "the dataset's own test images are in no fold"
        sides = defaultdict(set)
        for sample in fold.samples:
            sides[sample.sha256].add(sample.split)
        assert all(len(splits) == 1 for splits in sides.values())
        for split in ("train", "val", "test"):
            assert all(fold.counts()[split].values()), "every class is in every part of every fold"
    assert len({fold.digest for fold in folds}) == n_folds


@given(st.dictionaries(st.integers(0, 5), st.lists(st.integers(1, 4), min_size=1, max_size=60), min_size=1), st.integers(2, 9))
def test_folds_have_as_many_draws_of_each_class_or_one_more(sizes: dict[int, list[int]], n_folds: int) -> None:
    dealt = deal(sizes, n_folds)
    for label, of_class in sizes.items():
        counts = [dealt[label].count(fold) for fold in range(n_folds)]
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == len(of_class)
    if all(size == 1 for of_class in sizes.values() for size in of_class):
        totals = Counter(fold for folds in dealt.values() for fold in folds)
        assert max(totals.values()) - min(totals[fold] for fold in range(n_folds)) <= 1


@given(foldable(), st.integers(0, 2**32 - 1), st.randoms())
def test_the_order_of_files_has_no_influence_on_folds(given_folds: tuple[Dataset, int], seed: int, random: object) -> None:
    dataset, n_folds = given_folds
    shuffled = list(dataset.samples)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = Dataset("pictures", str(dataset.root), dataset.classes, tuple(shuffled))
    assert fold_datasets(again, n_folds, seed=seed) == fold_datasets(dataset, n_folds, seed=seed)


@given(st.integers(1, 12), st.integers(2, 14))
def test_folds_are_refused_exactly_where_a_class_has_too_few_images(count: int, n_folds: int) -> None:
    samples = [
        local_sample(ROOT / f"{label}/{n}.png", label, "train", f"{label}-{n}")
        for label in (0, 1)
        for n in (range(30), range(count))[label]
    ]
    dataset = Dataset("pictures", str(ROOT), ("many", "few"), tuple(samples))
    enough = n_folds <= count and count - -(-count // n_folds) >= 2  # one to test on, one to choose on, one to train on
    if enough:
        assert len(fold_datasets(dataset, n_folds)) == n_folds
        return
    allowed = "at least 3" if count < 3 else "only 3 folds" if count == 3 else f"2 to {count} folds"
    said = f"data.folds: {n_folds} .* class 'few' has {count} distinct image.* {allowed}"
    with pytest.raises(DataError, match=said) as caught:
        fold_datasets(dataset, n_folds)
    assert [problem.where for problem in caught.value.problems] == ["few"]
