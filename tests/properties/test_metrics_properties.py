"""What holds for the metrics of any logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from finetune.evaluation.metrics import evaluate_logits, fit_temperature


@st.composite
def judged(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    n, n_classes = draw(st.integers(1, 30)), draw(st.integers(2, 9))
    logits = draw(arrays.arrays(np.float32, (n, n_classes), elements=st.floats(-40, 40, width=32)))
    return logits, draw(arrays.arrays(np.int64, (n,), elements=st.integers(0, n_classes - 1)))


def names(n_classes: int) -> list[str]:
    return [str(i) for i in range(n_classes)]


@settings(max_examples=150, deadline=None)
@given(judged())
def test_figures_stay_in_their_ranges_and_agree_with_each_other(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = case
    found = evaluate_logits(logits, labels, names(logits.shape[1]))
    assert 0 <= found.top1 <= found.top5 <= 1
    assert found.top1_interval[0] <= found.top1 <= found.top1_interval[1]
    assert all(0 <= value <= 1 for value in (found.macro_f1, found.mean_per_class_accuracy))
    assert 0 <= found.ece <= 1 + 1e-12
    assert 0 <= found.brier <= 2 + 1e-12
    assert found.nll >= 0
    assert np.sum(found.confusion) == found.n == sum(b.n for b in found.bins) == len(labels)
    assert sum(row.n_correct for row in found.per_class) == pytest.approx(found.top1 * found.n)
    assert set(found.absent) == {str(i) for i in range(logits.shape[1])} - {str(i) for i in labels}


@settings(max_examples=100, deadline=None)
@given(judged(), st.randoms(use_true_random=False))
def test_the_order_of_the_images_does_not_change_any_figure(case: tuple[np.ndarray, np.ndarray], random) -> None:
    logits, labels = case
    order = list(range(len(labels)))
    random.shuffle(order)
    straight = evaluate_logits(logits, labels, names(logits.shape[1]))
    shuffled = evaluate_logits(logits[order], labels[order], names(logits.shape[1]))
    assert shuffled.metrics("val") == pytest.approx(straight.metrics("val"), rel=1e-12, abs=1e-12)
    assert shuffled.confusion == straight.confusion


@settings(max_examples=100, deadline=None)
@given(judged())
def test_the_same_logits_give_the_same_bits(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = case
    once, again = (evaluate_logits(logits.copy(), labels.copy(), names(logits.shape[1])) for _ in range(2))
    assert once == again


@settings(max_examples=100, deadline=None)
@given(judged())
def test_a_fitted_temperature_never_makes_the_nll_worse(case: tuple[np.ndarray, np.ndarray]) -> None:
    found = fit_temperature(*case)
    assert found.nll_after <= found.nll_before + 1e-9
    assert 0.0099 <= found.temperature <= 101
