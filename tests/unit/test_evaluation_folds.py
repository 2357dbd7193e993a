"""Cross-validation as figures: pooled judgement, spread over folds, and what is written down of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from answers import table
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, log_loss

from finetune.evaluation.evaluate import evaluate
from finetune.evaluation.folds import CrossValidation, FoldScore, spread
from finetune.evaluation.predictions import Predictions, concatenate
from finetune.tasks import task_named

CLASSES = ("cat", "dog", "owl")


def answers(n: int, seed: int) -> Predictions:
    """Answers about `n` images that are right more often than not; each seed has images of its own."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, n)
    logits = generator.normal(size=(n, 3)).astype(np.float32)
    logits[np.arange(n), labels] += 1.0
    return table(logits, labels, CLASSES, split="test", start=1000 * seed)


def cross_validation(sizes: tuple[int, ...] = (40, 41, 39)) -> CrossValidation:
    parts = [answers(n, seed) for seed, n in enumerate(sizes)]
    scores = tuple(
        FoldScore(number, sum(sizes) - len(part), len(part), evaluate(part).metrics("test"), "kept", 1.5)
        for number, part in enumerate(parts, start=1)
    )
    return CrossValidation(scores, evaluate(concatenate(parts, "cv")))


def test_pooled_figures_are_those_of_scikit_learn_on_all_answers_at_once() -> None:
    parts = [answers(n, seed) for seed, n in enumerate((40, 41, 39))]
    logits, labels = np.concatenate([part.logits for part in parts]), np.concatenate([part.labels for part in parts])
    pooled = evaluate(concatenate(parts, "cv"))
    assert pooled.n == 120
    assert pooled.values["top1"] == pytest.approx(accuracy_score(labels, logits.argmax(1)))
    assert pooled.values["macro_f1"] == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    trusted = log_loss(labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    assert pooled.values["loss"] == pytest.approx(trusted, rel=1e-5)
    weighted = sum(len(part) * evaluate(part).values["top1"] for part in parts) / 120
    assert pooled.values["top1"] == pytest.approx(weighted), "the mean over folds by their sizes"


def test_the_spread_is_that_of_the_textbook() -> None:
    values = [0.80, 0.84, 0.79, 0.86, 0.81]
    found = spread(values, test_to_train=0.25, largest=1.0)
    assert found.mean == pytest.approx(0.82)
    assert found.standard_deviation == pytest.approx(np.std(values, ddof=1))
    # Nadeau & Bengio 2003: (1/5 + 1/4) s² in the place of s²/5, with 4 degrees of freedom.
    half = 2.7764451052 * math.sqrt(0.45 * 0.00085)
    assert found.interval == pytest.approx((0.82 - half, 0.82 + half))
    assert stats.t.ppf(0.975, 4) == pytest.approx(2.7764451052)


def test_without_shared_training_images_it_is_the_plain_t_interval() -> None:
    values = [0.3, 0.5, 0.4]
    plain = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert spread(values, test_to_train=0.0).interval == pytest.approx(plain)


def test_an_interval_stays_where_its_metric_can_be() -> None:
    assert spread([1.0, 0.9], test_to_train=1.0, largest=1.0).interval == (0.0, 1.0)
    assert spread([1.0, 1.0, 1.0], test_to_train=0.5, largest=1.0).interval == (1.0, 1.0)
    assert spread([1.0, 3.0], test_to_train=1.0).interval[1] > 3.0, "a loss has no upper end"


def test_the_metrics_name_what_is_pooled_and_what_is_a_mean_over_folds() -> None:
    found = cross_validation()
    by_fold = [fold.metrics["test/top1"] for fold in found.folds]
    assert found.metrics["cv/top1"] == found.pooled.values["top1"]
    assert found.metrics["cv/top1_mean"] == pytest.approx(np.mean(by_fold))
    assert found.metrics["cv/top1_sd"] == pytest.approx(np.std(by_fold, ddof=1))
    assert {key.removesuffix("_mean") for key in found.metrics if key.endswith("_mean")} == {
        f"cv/{metric.key}" for metric in task_named("multiclass").metrics
    }
    ratio = 120 / 240
    assert found.spreads["loss"] == spread([fold.metrics["test/loss"] for fold in found.folds], test_to_train=ratio)


def test_what_is_written_down_of_the_folds_is_json_with_every_figure() -> None:
    found = cross_validation()
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [fold["metrics"] for fold in written["folds"]] == [dict(fold.metrics) for fold in found.folds]
    assert written["pooled"]["n"] == 120
    assert written["pooled"]["cv/top1"] == found.pooled.values["top1"]
    assert tuple(written["pooled"]["intervals"]["cv/top1"]) == found.pooled.intervals["top1"]
    assert written["over_folds"]["top1"]["mean"] == found.spreads["top1"].mean
    assert tuple(written["over_folds"]["top1"]["interval"]) == found.spreads["top1"].interval


def test_near_duplicates_of_a_folds_training_images_are_left_out_of_what_to_expect() -> None:
    found = cross_validation()
    first = found.folds[0]
    with_copies = replace(first, metrics={**first.metrics, "test_unseen/n": 30.0, "test_unseen/top1": 0.25})
    copies = replace(found, folds=(with_copies, *found.folds[1:]))
    assert (found.has_copies, copies.has_copies) == (False, True)
    assert (first.n_held_out, with_copies.n_held_out) == (40, 30)
    others = [fold.metrics["test/top1"] for fold in found.folds[1:]]
    assert copies.spreads["top1"].mean == pytest.approx(np.mean([0.25, *others]))
    assert copies.metrics["cv/top1_mean"] == copies.spreads["top1"].mean
    assert copies.pooled == found.pooled
