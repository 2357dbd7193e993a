"""What holds for the metrics of any logits."""

from __future__ import annotations

import numpy as np
import pytest
from answers import table
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.metrics.temperature import fit_softmax_temperature


@st.composite
def judged(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n, n_classes = draw(st.integers(1, 30)), draw(st.integers(2, 9))
    logits = draw(arrays.arrays(np.float32, (n, n_classes), elements=st.floats(-40, 40, width=32)))
    return logits, draw(arrays.arrays(np.int64, (n,), elements=st.integers(0, n_classes - 1)))


def figures_of(logits: np.ndarray, labels: np.ndarray) -> Evaluation:
    return evaluate(table(logits, labels, [str(i) for i in range(logits.shape[1])]))


@settings(max_examples=150, deadline=None)
@given(judged())
def test_figures_stay_in_their_ranges_and_agree_with_each_other(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = case
    found = figures_of(logits, labels)
    assert 0 <= found.values["top1"] <= found.values["top5"] <= 1
    low, high = found.intervals["top1"]
    assert low <= found.values["top1"] <= high
    assert all(0 <= value <= 1 for value in (found.values["macro_f1"], found.values["mean_per_class_accuracy"]))
    assert 0 <= found.values["ece"] <= 1 + 1e-12
    assert 0 <= found.values["brier"] <= 2 + 1e-12
    assert found.values["loss"] >= 0
    assert np.sum(found.confusion) == found.n == sum(b.n for b in found.bins) == len(labels)
    assert sum(row.n_correct for row in found.per_class) == pytest.approx(found.values["top1"] * found.n)
    assert set(found.absent) == {str(i) for i in range(logits.shape[1])} - {str(i) for i in labels}


@settings(max_examples=100, deadline=None)
@given(judged(), st.randoms(use_true_random=False))
def test_the_order_of_the_images_does_not_change_any_figure(case: tuple[np.ndarray, np.ndarray], random) -> None:
    logits, labels = case
    order = list(range(len(labels)))
    random.shuffle(order)
    straight = figures_of(logits, labels)
    shuffled = figures_of(logits[order], labels[order])
    assert shuffled.metrics("val") == pytest.approx(straight.metrics("val"), rel=1e-12, abs=1e-12)
    assert shuffled.confusion == straight.confusion


@settings(max_examples=100, deadline=None)
@given(judged())
def test_the_same_logits_give_the_same_bits(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = case
    once, again = (figures_of(logits.copy(), labels.copy()) for _ in range(2))
    assert once == again


@settings(max_examples=100, deadline=None)
@given(judged())
def test_a_fitted_temperature_never_makes_the_nll_worse(case: tuple[np.ndarray, np.ndarray]) -> None:
    found = fit_softmax_temperature(*case)
    assert found.nll_after <= found.nll_before + 1e-9
    assert 0.0099 <= found.temperature <= 101
