"""What holds for the split of any dataset, whatever its sizes, copies and fractions."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from folders import local_sample, path_of
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.dataset import Dataset, LocalFile, Sample
from finetune.data.split import fold_datasets, leaked, split_dataset
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


@given(datasets(), st.integers(0, 2**32 - 1), st.randoms())
def test_the_order_of_files_has_no_influence(dataset: Dataset, seed: int, rng: object) -> None:
    shuffled = list(dataset.samples)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
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


@given(foldable(), st.integers(0, 2**32 - 1), st.randoms())
def test_the_order_of_files_has_no_influence_on_folds(given_folds: tuple[Dataset, int], seed: int, rng: object) -> None:
    dataset, n_folds = given_folds
    shuffled = list(dataset.samples)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
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
    largest = "fewer than 3:" if count < 3 else f"--folds {count};"
    said = f"(?s)data.folds: {n_folds} .* class 'few' has {count} distinct image.* {largest} .*{allowed}"
    with pytest.raises(DataError, match=said) as caught:
        fold_datasets(dataset, n_folds)
    assert [problem.where for problem in caught.value.problems] == ["few"]


def random_dataset(rng: random.Random) -> Dataset:
    """Images of some classes, in groups and copies that may go across classes."""
    n_classes = rng.randint(1, 5)
    several = rng.random() < 0.2
    samples = []
    for number in range(rng.randint(2 * n_classes, 120)):
        label = number % n_classes if number < 2 * n_classes else rng.randrange(n_classes)
        target = tuple(sorted({label, rng.randrange(n_classes)})) if several else label
        group = f"g{rng.randrange(30)}" if number >= 2 * n_classes and rng.random() < 0.6 else None
        content = f"{rng.randrange(80)}" if number >= 2 * n_classes and rng.random() < 0.2 else f"own {number}"
        sample = local_sample(ROOT / f"{number}.png", 0, None, content)
        samples.append(replace(sample, target=target, group=group))
    return Dataset("pictures", str(ROOT), tuple("abcde"[:n_classes]), tuple(samples))


def together(dataset: Dataset) -> list[set[str | None]]:
    """The sides of every group and of every content."""
    sides: dict[str, set[str | None]] = defaultdict(set)
    for sample in dataset.samples:
        sides[f"content {sample.sha256}"].add(sample.split)
        if sample.group is not None:
            sides[f"group {sample.group}"].add(sample.split)
    return list(sides.values())


def test_no_group_and_no_copy_is_on_two_sides_in_a_thousand_random_cases() -> None:
    rng = random.Random(7)
    n_groups = n_folded = 0
    for seed in range(1000):
        dataset = random_dataset(rng)
        split = split_dataset(dataset, val_fraction=rng.uniform(0.05, 0.4), test_fraction=rng.choice([0.0, 0.2]), seed=seed)
        assert {len(sides) for sides in together(split)} == {1}
        assert len(split.samples) == len(dataset.samples)
        assert leaked(split) == {}
        n_groups += sum(sample.group is not None for sample in dataset.samples)
        with contextlib.suppress(DataError):  # too few images for folds
            for fold in fold_datasets(split, rng.randint(2, 4), seed=seed):
                assert {len(sides) for sides in together(fold)} == {1}
                n_folded += 1
    assert n_groups > 10_000
    assert n_folded > 500


def large_dataset(rng: random.Random) -> Dataset:
    """Classes of so many images, some in groups, that none needs to be helped into a split."""
    samples = []
    for label in range(3):
        for number in range(rng.randint(150, 250)):
            sample = local_sample(ROOT / f"{label}/{number}.png", label, None, f"{rng.random()}")
            samples.append(replace(sample, group=f"{label}-{number // 2}" if rng.random() < 0.3 else None))
    return Dataset("pictures", str(ROOT), tuple("abc"), tuple(samples))


def test_a_hundredth_more_or_fewer_files_move_nobody_else() -> None:
    rng = random.Random(11)
    for seed in range(20):
        dataset = large_dataset(rng)
        before = {sample.id: sample.split for sample in split_dataset(dataset, seed=seed).samples}
        folds = {s.id: n for n, fold in enumerate(fold_datasets(dataset, 4, seed=seed)) for s in fold.of("test")}
        n_more = max(1, len(dataset.samples) // 100)
        more = [local_sample(ROOT / f"new/{n}.png", rng.randrange(3), None, f"{rng.random()}") for n in range(n_more)]
        fewer = rng.sample(dataset.samples, len(dataset.samples) - n_more)
        for samples in ((*dataset.samples, *more), fewer):
            changed = replace(dataset, samples=tuple(samples))
            after = {sample.id: sample.split for sample in split_dataset(changed, seed=seed).samples}
            assert all(after[one] == before[one] for one in after.keys() & before.keys())
            dealt = {s.id: n for n, fold in enumerate(fold_datasets(changed, 4, seed=seed)) for s in fold.of("test")}
            assert all(dealt[one] == folds[one] for one in dealt.keys() & folds.keys())


def test_shares_are_as_asked_for_over_many_images() -> None:
    samples = [local_sample(ROOT / f"{n}.png", n % 4, None, f"image {n}") for n in range(8_000)]
    dataset = Dataset("pictures", str(ROOT), tuple("abcd"), tuple(samples))
    split = split_dataset(dataset, val_fraction=0.2, test_fraction=0.1, seed=5)
    for name, share in (("val", 0.2), ("test", 0.1)):
        for count in split.counts()[name].values():
            assert abs(count - share * 2000) < 4 * (2000 * share * (1 - share)) ** 0.5
    sizes = [len(fold.of("test")) for fold in fold_datasets(split, 5)]
    assert max(sizes) - min(sizes) < 300


def test_a_class_that_the_rule_leaves_out_of_a_split_gets_its_nearest_image_there() -> None:
    """Whatever else is there: only classes that are small may have such an image, and they have one a split."""
    samples = [local_sample(ROOT / f"{label}/{n}.png", label, None, f"{label} {n}") for label in range(200) for n in range(4)]
    dataset = Dataset("pictures", str(ROOT), tuple(f"{n:03}" for n in range(200)), tuple(samples))
    counts = split_dataset(dataset, val_fraction=0.15, test_fraction=0.15).counts()
    assert all(all(by_class.values()) for by_class in counts.values())
    alone = split_dataset(replace(dataset, samples=tuple(samples[:4]), classes=("000",)), val_fraction=0.15, test_fraction=0.15)
    sides = {sample.id: sample.split for sample in split_dataset(dataset, val_fraction=0.15, test_fraction=0.15).samples}
    assert {sample.id: sample.split for sample in alone.samples}.items() <= sides.items()


def test_every_label_that_three_images_have_is_in_every_split_also_where_images_have_several() -> None:
    n_labels = 0
    for seed in range(100):
        rng = random.Random(seed)
        shares = [rng.choice([0.02, 0.05, 0.2, 0.5]) for _ in range(rng.randrange(3, 12))]
        targets = [tuple(c for c, share in enumerate(shares) if rng.random() < share) for _ in range(rng.randrange(20, 200))]
        samples = [
            Sample(str(n), LocalFile(Path(str(n))), target, sha256=hashlib.sha256(f"{seed}/{n}".encode()).hexdigest())
            for n, target in enumerate(targets)
        ]
        divided = split_dataset(Dataset("pictures", str(ROOT), tuple(map(str, range(len(shares)))), tuple(samples)), seed=seed)
        counts = divided.counts()
        for name in divided.classes:
            if sum(counts[split][name] for split in counts) >= 3:
                assert all(counts[split][name] for split in ("train", "val", "test")), f"label {name} with seed {seed}"
                n_labels += 1
    assert n_labels > 400
