"""Figures of images with several labels against scikit-learn, thresholds, losses and the solved head."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn import metrics as trusted
from sklearn.linear_model import LogisticRegression

from finetune.errors import InvalidInput
from finetune.evaluation.compare import ArmPredictions, compare_pairs, headline_error
from finetune.evaluation.evaluate import evaluate
from finetune.evaluation.mistakes import confident_mistakes
from finetune.evaluation.paired import compare_two, paired_gain
from finetune.evaluation.predictions import Predictions, concatenate, read, write
from finetune.evaluation.tables import rows_of
from finetune.features.sigmoid_head import solve_sigmoid_head
from finetune.metrics import labels
from finetune.runs.evaluate import apply_thresholds
from finetune.tasks import task_named, task_of
from finetune.tasks.balance import balance_of_labels
from finetune.training.objectives.multilabel import MultilabelObjective

TASK = task_named("multilabel")


def made_up(n: int = 200, n_classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits with ties, and targets that they lean towards; labels are rarer one after the other."""
    chance = np.random.default_rng(seed)
    targets = (chance.random((n, n_classes)) < np.linspace(0.5, 0.08, n_classes)).astype(np.uint8)
    logits = np.round(chance.normal(size=(n, n_classes)) + 1.5 * targets - 1.0, 1).astype(np.float32)
    return logits, targets


def table(logits: np.ndarray, targets: np.ndarray, split: str = "val") -> Predictions:
    ids = tuple(str(number) for number in range(len(logits)))
    names = tuple(f"label {number}" for number in range(logits.shape[1]))
    return Predictions(split, "multilabel", names, ids, np.zeros((len(ids), 32), np.uint8), targets, logits)


def test_the_figures_are_those_of_scikit_learn() -> None:
    logits, targets = made_up()
    rows = labels.label_results(logits, targets)
    given = logits >= 0
    assert labels.average_precisions(rows) == pytest.approx(trusted.average_precision_score(targets, logits, average=None))
    assert labels.mean_average_precision(rows) == pytest.approx(trusted.average_precision_score(targets, logits))
    assert labels.micro_f1(rows) == pytest.approx(trusted.f1_score(targets, given, average="micro"))
    assert labels.macro_f1(rows) == pytest.approx(trusted.f1_score(targets, given, average="macro"))
    assert labels.exact_match(rows) == pytest.approx(trusted.accuracy_score(targets, given))
    probs = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert labels.nll(rows) == pytest.approx(trusted.log_loss(targets.ravel(), probs.ravel()))
    assert labels.brier(rows) == pytest.approx(trusted.brier_score_loss(targets.ravel(), probs.ravel()))


def test_a_label_without_an_image_is_in_no_mean_and_its_ratios_are_unknown() -> None:
    logits, targets = made_up()
    targets[:, 2] = 0
    kept = [0, 1, 3, 4]
    rows = labels.label_results(logits, targets)
    assert labels.mean_average_precision(rows) == pytest.approx(
        trusted.average_precision_score(targets[:, kept], logits[:, kept])
    )
    found = evaluate(table(logits, targets))
    assert found.absent == ("label 2",)
    assert (found.per_class[2].recall, found.per_class[2].average_precision, found.per_class[2].f1) == (None, None, None)
    for row in found.per_class:
        for name, (low, high) in row.intervals.items():
            assert 0 <= low <= getattr(row, name) <= high <= 1
    assert found.facts == pytest.approx(
        {"labels_per_image": targets.sum() / 200, "labels_given_per_image": (logits >= 0).sum() / 200}
    )
    assert set(found.metrics("test")) >= {"test/map", "test/map_low", "test/map_high", "test/labels_per_image"}


def test_an_interval_is_never_empty_and_holds_the_value() -> None:
    _, targets = made_up(40)
    low, high = labels.mean_average_precision_interval(labels.label_results(targets * 20.0 - 10.0, targets))
    assert 0.8 < low < 1.0 == high


def test_what_is_no_such_table_is_refused() -> None:
    logits, targets = made_up(10)
    with pytest.raises(InvalidInput, match=r"shape \(10, 5\) against targets of shape \(10,\)"):
        labels.label_results(logits, targets[:, 0])
    with pytest.raises(InvalidInput, match="1 where a label applies"):
        labels.label_results(logits, targets + 1)


# ── the task, from labels to answers ──────────────────────────────────────────────────────────────


def test_the_task_is_found_from_the_labels() -> None:
    assert task_of([0, 1, 2]).name == "multiclass"
    assert task_of([(0,), (1, 2)]).name == "multilabel"
    assert task_of([(), (1,)]).name == "multilabel"


def test_thresholds_are_near_the_best_on_new_images_and_rare_labels_keep_one_half() -> None:
    logits, targets = made_up(400, 5)
    others, of_others = made_up(4000, 5, seed=1)
    targets[:, 4] = 0
    targets[:5, 4] = 1
    found = TASK.choose_thresholds(logits, targets)
    assert found is not None
    assert found[4] == 0.0, "five images are too few to choose by"
    for label in range(4):
        tried = [trusted.f1_score(of_others[:, label], others[:, label] >= limit) for limit in np.linspace(-4, 4, 81)]
        reached = trusted.f1_score(of_others[:, label], others[:, label] >= found[label])
        at_half = trusted.f1_score(of_others[:, label], others[:, label] >= 0)
        assert max(tried) - 0.01 < reached
        assert at_half - 0.01 < reached


def test_thresholds_move_with_the_logits() -> None:
    """Class weights shift logits and other losses scale them; which images are given a label must not change."""
    logits, targets = made_up(400)
    found = TASK.choose_thresholds(logits, targets)
    for scale, shift in ((1.0, 3.0), (0.3, -1.0), (4.0, 0.0)):
        moved = TASK.choose_thresholds(scale * logits + shift, targets)
        assert moved == pytest.approx(scale * np.asarray(found) + shift, abs=1e-3)


def test_labels_that_are_told_apart_without_a_mistake_or_not_at_all_have_thresholds_too() -> None:
    targets = np.zeros((60, 3), np.uint8)
    targets[:30] = 1
    logits = np.stack([20.0 * targets[:, 0] - 10, np.zeros(60), 5 - 10.0 * targets[:, 2]], axis=1).astype(np.float32)
    found = TASK.choose_thresholds(logits, targets)
    assert found is not None
    assert -10 < found[0] < 10
    assert np.isfinite(found).all()
    assert found[2] == 0.0, "the wrong way round"


def test_thresholds_of_probabilities_and_logits_give_the_same_labels() -> None:
    logits, targets = made_up()
    limits = np.array([0.3, -0.45, 0.0, 2.05, -1.35])
    for temperature in (0.5, 1.0, 3.0):
        as_probabilities = TASK.probability_thresholds(limits, temperature)
        assert TASK.logit_thresholds(as_probabilities, temperature) == pytest.approx(limits)
        probs = TASK.probabilities(logits, temperature)
        for row, given in enumerate(TASK.image_results(logits, targets, limits).given):  # type: ignore[attr-defined]
            assert sorted(TASK.predict_labels(probs[row], as_probabilities)) == list(np.flatnonzero(given))


def test_val_is_judged_by_thresholds_that_its_own_images_have_not_chosen() -> None:
    logits, targets = made_up(300)
    held_out, judged = table(logits, targets), table(*made_up(100, seed=1), "test")
    tables, chosen = apply_thresholds({"val": held_out, "test": judged})
    assert chosen is not None
    assert tables["test"].thresholds == pytest.approx(np.tile(np.float32(chosen), (100, 1)))
    of_val = tables["val"].thresholds
    assert of_val is not None
    assert len(np.unique(of_val, axis=0)) > 1, "each part has its own"
    first = np.arange(300) % 5 != 0
    assert of_val[0] == pytest.approx(TASK.choose_thresholds(logits[first], targets[first]))
    again, carried = apply_thresholds({"test": judged}, chosen)
    assert carried == chosen
    assert again["test"].thresholds == pytest.approx(tables["test"].thresholds)
    assert apply_thresholds({"test": judged}) == ({"test": judged}, None)


def test_a_table_keeps_its_thresholds(tmp_path) -> None:  # type: ignore[no-untyped-def]
    logits, targets = made_up(20)
    given = table(logits, targets).with_thresholds(np.array([0.5, 0.0, -0.5, 1.0, 0.0]))
    write(tmp_path / "t.npz", given)
    found = read(tmp_path / "t.npz")
    assert found.thresholds == pytest.approx(given.thresholds)
    assert found.take([3, 1]).thresholds == pytest.approx(given.thresholds[[3, 1]])  # type: ignore[index]
    joined = concatenate([found, table(logits, targets)], "cv")
    assert joined.thresholds is not None
    assert joined.thresholds[20:] == pytest.approx(0.0)
    assert joined.thresholds[:20] == pytest.approx(given.thresholds)
    row = next(rows_of(found))
    assert row["label"] == str([found.classes[label] for label in np.flatnonzero(targets[0])]).replace("'", '"')
    assert row["predicted"].startswith("[")
    with pytest.raises(InvalidInput, match="thresholds of shape"):
        Predictions(
            "val", "multilabel", found.classes, found.ids, found.sha256, targets, logits, None, np.zeros((3, 5), np.float32)
        )


# ── losses ────────────────────────────────────────────────────────────────────────────────────────


def test_the_asymmetric_loss_is_that_of_its_paper() -> None:
    """Ridnik et al. 2021, equations 4 to 7, written out for one image and label at a time."""
    logits, targets = made_up(30)
    asymmetric = MultilabelObjective().minimising("asymmetric")
    found = float(asymmetric.loss(torch.from_numpy(logits), torch.from_numpy(targets), torch.from_numpy(targets), 1.0, 0.0))
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    shifted = np.maximum(p - 0.05, 0.0)
    expected = -np.where(targets == 1, np.log(p), shifted**4 * np.log(1 - shifted)).mean()
    assert found == pytest.approx(expected, rel=1e-5)
    easy = torch.full((1, 1), -4.0, requires_grad=True)
    asymmetric.loss(easy, torch.zeros((1, 1)), torch.zeros((1, 1)), 1.0, 0.0).backward()
    assert float(easy.grad) == 0.0, "an absent label that is improbable already teaches nothing"  # type: ignore[arg-type]


def test_weights_are_those_of_the_images_that_have_a_label() -> None:
    _, targets = made_up(400)
    balanced = balance_of_labels(targets, "balanced", 0.0).weights
    effective = balance_of_labels(targets, "effective_number", 0.0).weights
    assert balanced is not None
    assert effective is not None
    assert balanced * targets.sum(axis=0) == pytest.approx((1 - targets).sum(axis=0).astype(float))
    assert (np.abs(np.log(effective)) <= np.abs(np.log(balanced))).all()
    assert balance_of_labels(np.ones((4, 2), np.uint8), "balanced", 0.0).weights == pytest.approx(1.0)
    logits = torch.zeros((400, 5))
    given = torch.from_numpy(targets)
    weighted = MultilabelObjective().balanced(balance_of_labels(targets, "balanced", 0.0))
    expected = np.where(targets == 1, balanced, 1.0).mean() * np.log(2)
    assert float(weighted.loss(logits, given, given, 1.0, 0.0)) == pytest.approx(expected, rel=1e-5)


# ── the solved head ───────────────────────────────────────────────────────────────────────────────


def features_of(targets: np.ndarray, seed: int = 0) -> np.ndarray:
    chance = np.random.default_rng(seed)
    directions = chance.normal(size=(targets.shape[1], 12))
    return ((targets @ directions + chance.normal(size=(len(targets), 12))) * 10.0 ** chance.uniform(-1, 1, 12)).astype(
        np.float32
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_each_label_is_solved_as_scikit_learn_solves_it(weighted: bool) -> None:
    _, targets = made_up(300, 4)
    features = features_of(targets)
    weights = balance_of_labels(targets, "balanced", 0.0).weights if weighted else None
    head = solve_sigmoid_head(features, targets, 4, l2=0.03, class_weights=weights)
    assert head.converged
    standardised = ((features - features.mean(axis=0)) / features.std(axis=0)).astype(np.float64)
    for label in range(4):
        of_image = np.where(targets[:, label] == 1, 1.0 if weights is None else weights[label], 1.0)
        regression = LogisticRegression(C=1 / (0.03 * 300), tol=1e-8, max_iter=5000)
        regression.fit(standardised, targets[:, label], sample_weight=of_image)
        np.testing.assert_allclose(head.logits(features)[:, label], regression.decision_function(standardised), atol=1e-2)


def test_a_label_that_no_training_image_has_becomes_improbable_and_points_nowhere() -> None:
    _, targets = made_up(120, 4)
    targets[:, 1], targets[:, 3] = 0, 1
    head = solve_sigmoid_head(features_of(targets), targets, 4)
    assert head.converged
    assert not head.weight[[1, 3]].any()
    assert head.bias[1] == pytest.approx(-np.log(121), rel=1e-5)
    assert head.bias[3] == pytest.approx(np.log(121), rel=1e-5)
    assert head.held_out_logits is not None
    assert np.isfinite(head.held_out_logits).all()


# ── compared ──────────────────────────────────────────────────────────────────────────────────────


def answers(gain: float, seed: int, n: int = 250) -> Predictions:
    """Answers to the same images, better with a larger gain."""
    _, targets = made_up(n)
    chance = np.random.default_rng([seed, 1])
    return table((gain * targets + chance.normal(size=targets.shape)).astype(np.float32), targets, "test")


def test_two_models_are_compared_by_mean_average_precision_over_resampled_images() -> None:
    good, bad = answers(3.0, 0), answers(1.0, 1)
    (pair,) = compare_pairs([ArmPredictions("good", (good,)), ArmPredictions("bad", (bad,))])
    values = [evaluate(one).values["map"] for one in (good, bad)]
    assert (pair.headline.metric, pair.test, pair.p_exact) == ("map", "paired bootstrap", None)
    assert pair.headline.difference == pytest.approx(values[0] - values[1])
    assert pair.winner == "good"
    assert pair.headline.low < pair.headline.difference < pair.headline.high
    assert {other.metric for other in pair.others} == {"micro_f1", "macro_f1", "exact_match", "loss", "ece"}
    assert pair.smallest_detectable > 0
    gain = paired_gain(good, bad)
    assert (gain.gain, gain.metric) == (pytest.approx(values[0] - values[1]), "map")
    assert gain.pays
    assert not paired_gain(good, good).pays


@pytest.mark.longer
def test_the_bootstrap_is_as_often_wrong_as_it_says() -> None:
    """Two models that are equally good: a difference is found in about one of twenty comparisons."""
    found = [
        compare_pairs([ArmPredictions("a", (answers(2.0, seed, 120),)), ArmPredictions("b", (answers(2.0, seed + 500, 120),))])[0]
        for seed in range(40)
    ]
    assert sum(pair.significant for pair in found) <= 6
    assert 0.5 < np.std([pair.headline.difference for pair in found]) / np.mean([p.headline.standard_error for p in found]) < 1.6


def test_seeds_and_folds_count_as_they_do_for_one_label() -> None:
    several = [ArmPredictions(str(gain), tuple(answers(gain, 10 * seed) for seed in range(3))) for gain in (3.0, 1.5)]
    (pair,) = compare_pairs(several)
    assert pair.test == "t"
    assert 0 < pair.headline.seed_share < 1
    error, quantile = headline_error(several[0])
    assert 0 < error < 0.1 < 1.9 < quantile
    folds = tuple(number % 5 for number in range(250))
    arms = [ArmPredictions(str(gain), (answers(gain, 0),), folds=folds, n_train=200) for gain in (3.0, 1.5)]
    (of_folds,) = compare_pairs(arms)
    assert (of_folds.test, of_folds.headline.degrees_of_freedom, of_folds.winner) == ("corrected resampled t", 4.0, "3.0")


def test_a_promotion_compares_versions_whose_classes_are_in_another_order() -> None:
    good, bad = answers(3.0, 0), answers(1.0, 1)
    digests = np.random.default_rng(0).integers(0, 256, (250, 32), dtype=np.uint8)
    order = [4, 2, 0, 1, 3]
    shuffled = replace(
        bad,
        classes=tuple(bad.classes[o] for o in order),
        logits=bad.logits[:, order],
        sha256=digests,
        targets=bad.labels[:, order],
    )
    found = compare_two(replace(good, sha256=digests), shuffled, lambda digest: False)
    assert found is not None
    assert (found.metric, found.test, found.n) == ("map", "paired bootstrap", 250)
    assert found.second == pytest.approx(evaluate(bad).values["map"])
    assert found.p_value < 1e-6


def test_the_surest_mistakes_come_first_with_all_labels_in_words() -> None:
    logits, targets = made_up(100)
    found = confident_mistakes(table(logits, targets), 1000)
    wrong = np.flatnonzero(((logits >= 0) != targets).any(axis=1))
    assert sorted(one.index for one in found) == list(wrong)
    assert [one.confidence for one in found] == sorted((one.confidence for one in found), reverse=True)
    first = found[0]
    assert first.confidence == pytest.approx(
        1 / (1 + np.exp(-np.abs(logits[first.index])[(logits[first.index] >= 0) != targets[first.index]].max()))
    )
    assert first.true == TASK.label_text(targets[first.index], [f"label {number}" for number in range(5)])
    assert {one.predicted for one in found} >= {"(no label)"}
