"""What may be registered: not a model that is no better than an answer which does not look at the image."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from answers import made_up, table

from finetune.errors import NoBetterThanChance
from finetune.evaluation.evaluate import evaluate
from finetune.evaluation.predictions import Predictions
from finetune.runs.chance import chance_warning, refuse_diverged, refuse_no_better_than_chance
from finetune.runs.evaluate import (
    MIN_IMAGES_TO_CALIBRATE,
    embeddings_match,
    evaluate_splits,
    fit_temperature,
)


def answered(n_right: int, n: int, *, sure: float = 1.0) -> Predictions:
    """Answers to n images, half of each of two classes, of which the first `n_right` are right."""
    targets = np.arange(n) % 2
    given = np.where(np.arange(n) < n_right, targets, 1 - targets)
    return table(sure * np.eye(2, dtype=np.float32)[given], targets, split="test")


@pytest.mark.parametrize("n_right", [0, 30, 50])
def test_a_model_that_is_no_better_than_one_answer_to_all_is_refused_with_both_figures(n_right: int) -> None:
    says = rf"its top1 on the 100 test images is {n_right / 100:.3f}; one prediction for all of them has 0.500"
    with pytest.raises(NoBetterThanChance, match=says) as caught:
        refuse_no_better_than_chance(answered(n_right, 100))
    assert "--set export.register_model=always" in caught.value.message
    assert says.replace("\\", "") in str(chance_warning(answered(n_right, 100))), "and where the request insists, it is said"


def test_embeddings_hold_only_where_this_model_gives_the_same_ones() -> None:
    """As of a fold or of the run before a refit: with a frozen backbone they do, with one that was trained they do not."""
    own = np.random.default_rng(0).random((60, 8)).astype(np.float32)
    answers = replace(answered(60, 60), embedding=own)
    context: Any = SimpleNamespace(dataset=SimpleNamespace(samples=tuple(SimpleNamespace(id=name) for name in answers.ids)))

    def learner(embedding: np.ndarray) -> Any:
        def predict(samples: Any, *_: Any) -> tuple[None, np.ndarray]:
            return None, embedding[[answers.ids.index(sample.id) for sample in samples]]

        return SimpleNamespace(predict=predict)

    assert embeddings_match(learner(own), context, answers)
    assert embeddings_match(learner(own * np.float32(1.0001)), context, answers), "a GPU rounds otherwise"
    one_fold_differs = own.copy()
    one_fold_differs[40:] += 0.5
    assert not embeddings_match(learner(one_fold_differs), context, answers)
    assert not embeddings_match(learner(own), context, replace(answers, embedding=None))
    context.dataset.samples = context.dataset.samples[:30]
    assert not embeddings_match(learner(own), context, answers)


def test_a_model_that_is_better_passes_without_a_word() -> None:
    refuse_no_better_than_chance(answered(51, 100))
    refuse_diverged(answered(51, 100))
    assert chance_warning(answered(51, 100)) is None


def test_chance_is_the_share_of_the_largest_class_and_not_one_in_so_many() -> None:
    targets = np.array([0] * 90 + [1] * 10)
    always_the_first = table(np.tile(np.array([[1, 0]], np.float32), (100, 1)), targets)
    with pytest.raises(NoBetterThanChance, match=r"is 0\.900; one prediction for all of them has 0\.900"):
        refuse_no_better_than_chance(always_the_first)


def test_a_few_images_refuse_nobody_and_say_so() -> None:
    refuse_no_better_than_chance(answered(2, 6))
    said = chance_warning(answered(2, 6))
    assert said is not None
    assert said.startswith("registered without proof that it is better than chance: its top1 on the 6 test images is 0.333")
    assert said.endswith("6 images are few, so evaluate it on more")


def test_where_all_images_are_of_one_class_there_is_no_chance_to_beat() -> None:
    one_class = table(np.tile(np.array([[1, 0]], np.float32), (100, 1)), np.zeros(100, np.int64))
    refuse_no_better_than_chance(one_class)
    assert chance_warning(one_class) is None


@pytest.mark.parametrize("n", [6, 100])
def test_weights_that_ran_away_are_refused_however_few_images_tell(n: int) -> None:
    diverged = answered(n // 2, n, sure=1e9)
    with pytest.raises(NoBetterThanChance, match=rf"its loss on the {n} test images is 5e\+08; random predictions have 0\.693"):
        refuse_diverged(diverged)
    assert str(chance_warning(diverged)).endswith("so training diverged")


def test_a_good_model_that_is_far_too_sure_of_its_mistakes_has_not_diverged() -> None:
    sure = answered(90, 100, sure=100.0)
    assert evaluate(sure).values["loss"] == pytest.approx(10.0)
    refuse_diverged(sure)
    assert chance_warning(sure) is None


def test_a_temperature_needs_enough_held_out_images_and_a_best_value() -> None:
    logits, targets = made_up(MIN_IMAGES_TO_CALIBRATE, 3)
    assert fit_temperature(table(logits, targets)) is not None
    assert fit_temperature(table(logits[:-1], targets[:-1])) is None
    assert fit_temperature(answered(100, 100)) is None, "where every image is predicted correctly, none fits best"


def test_every_split_is_judged_and_val_alone_gives_the_temperature() -> None:
    val, test = table(*made_up(120, 3)), table(*made_up(130, 3, seed=1), split="test")
    found = evaluate_splits({"val": val, "test": test})
    assert found.evaluations == {"val": evaluate(val), "test": evaluate(test)}
    assert found.temperature == fit_temperature(val)
    assert evaluate_splits({"test": test}).temperature is None
    assert found.metrics["test/top1"] == evaluate(test).values["top1"]
