"""Two models compared image by image: only images that one of the two gets right count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from answers import table

from finetune.errors import InvalidInput
from finetune.evaluation.paired import compare_two, mcnemar_mid_p, paired_gain
from finetune.evaluation.predictions import Predictions

N = 200


def right(correct: np.ndarray) -> Predictions:
    """Answers to N images of two classes, right where `correct` says so."""
    targets = np.arange(N) % 2
    given = np.where(correct, targets, 1 - targets)
    return table(np.eye(2, dtype=np.float32)[given], targets)


def first(count: int) -> np.ndarray:
    return np.arange(N) < count


def test_the_standard_error_counts_only_images_that_one_of_the_two_gets_right() -> None:
    same_but_four = first(100).copy()
    same_but_four[[0, 1, 2]] = False
    same_but_four[150] = True
    gain = paired_gain(right(same_but_four), right(first(100)))
    assert gain.gain == pytest.approx(-2 / N)
    differences = same_but_four.astype(float) - first(100)
    assert gain.standard_error == pytest.approx(differences.std() / np.sqrt(N))
    assert str(gain) == "-1.0 ± 1.0 points of val top1"


def test_equal_answers_do_not_pay() -> None:
    gain = paired_gain(right(first(100)), right(first(100)))
    assert (gain.gain, gain.pays) == (0.0, False)
    assert gain.standard_error == 1 / N, "at least what one image that differs would give"


def test_a_gain_pays_from_its_standard_error_on() -> None:
    assert not paired_gain(right(first(101)), right(first(100))).pays
    assert paired_gain(right(first(102)), right(first(100))).pays


def test_answers_to_other_images_are_not_compared() -> None:
    other = table(right(first(100)).logits, np.arange(N) % 2, start=1)
    with pytest.raises(InvalidInput, match="same images"):
        paired_gain(right(first(100)), other)


def test_two_models_are_compared_on_the_images_that_both_answered_and_neither_has_seen() -> None:
    found = compare_two(right(first(100)), right(~first(40)), lambda sha256: False)
    assert found is not None
    assert (found.metric, found.n, found.first, found.second, found.left_out) == ("top1", N, 0.5, 0.8, 0)
    assert (found.only_first, found.only_second) == (40, 100)
    assert found.p_value == pytest.approx(mcnemar_mid_p(40, 100))
    digests = right(first(0)).digests()
    kept = compare_two(right(first(100)), right(~first(40)), digests[:150].__contains__)
    assert kept is not None
    assert (kept.n, kept.left_out, kept.first, kept.second) == (50, 150, 0.0, 1.0)
    assert compare_two(right(first(100)), right(first(100)), lambda sha256: True) is None


def test_models_with_other_classes_are_not_compared_image_by_image() -> None:
    with pytest.raises(InvalidInput, match="same task and classes"):
        compare_two(right(first(1)), replace(right(first(1)), classes=("a", "other")), lambda sha256: False)
