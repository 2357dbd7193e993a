"""Two models compared image by image: only images that one of the two gets right count."""

from __future__ import annotations

import numpy as np
import pytest
from answers import table

from finetune.errors import InvalidInput
from finetune.evaluation.paired import paired_gain
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
