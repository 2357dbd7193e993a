"""What holds for the split of any dataset, whatever its sizes, copies and fractions."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from finetune.data.index import Dataset, Sample
from finetune.data.split import cut, split_dataset

ROOT = Path("/photos")

FRACTIONS = st.tuples(st.floats(0.01, 0.45), st.one_of(st.just(0.0), st.floats(0.01, 0.44)))


@st.composite
def datasets(draw: st.DrawFn) -> Dataset:
    """Two to four classes of two or more distinct images, some of them in several copies, in any order."""
    n_classes = draw(st.integers(2, 4))
    samples = []
    for label in range(n_classes):
        for number, copies in enumerate(draw(st.lists(st.integers(1, 4), min_size=2, max_size=25))):
            samples += [Sample(ROOT / f"{label}/{number}-{copy}.png", label, None, f"{label}-{number}") for copy in range(copies)]
    return Dataset(ROOT, tuple("abcd"[:n_classes]), tuple(draw(st.permutations(samples))))


@given(datasets(), FRACTIONS, st.integers(0, 2**32 - 1))
def test_a_split_keeps_every_image_once_on_one_side_and_every_class_in_train_and_val(
    dataset: Dataset, fractions: tuple[float, float], seed: int
) -> None:
    val_fraction, test_fraction = fractions
    split = split_dataset(dataset, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    assert Counter(sample.path for sample in split.samples) == Counter(sample.path for sample in dataset.samples)
    sides = defaultdict(set)
    for sample in split.samples:
        sides[sample.sha256].add(sample.split)
    assert all(len(splits) == 1 for splits in sides.values())
    counts = split.counts()
    assert all(count for count in counts["train"].values())
    assert all(count for count in counts["val"].values())
    if test_fraction > 0:
        for label, name in enumerate(dataset.classes):
            distinct = len({sample.sha256 for sample in dataset.samples if sample.label == label})
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
    again = Dataset(dataset.root, dataset.classes, tuple(shuffled))
    assert split_dataset(again, seed=seed) == split_dataset(dataset, seed=seed)
