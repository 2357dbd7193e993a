"""Every figure of an evaluation equals scikit-learn's or SciPy's, and says honestly what it could not measure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from answers import made_up, names, table
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import binomtest
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from finetune.errors import InvalidInput, TrainingError
from finetune.evaluation.evaluate import Evaluation, RunEvaluation, evaluate, read_evaluation, write_evaluation
from finetune.evaluation.mistakes import confident_mistakes
from finetune.metrics.intervals import wilson_interval
from finetune.metrics.temperature import fit_softmax_temperature

EXACT = {"rel": 1e-12, "abs": 1e-12}


def judged(logits: np.ndarray, labels: np.ndarray) -> Evaluation:
    return evaluate(table(logits, labels))


@pytest.mark.parametrize(("n_classes", "n"), [(2, 50), (7, 500), (40, 5000)])
def test_every_figure_equals_scikit_learn(n_classes: int, n: int) -> None:
    logits, labels = made_up(n, n_classes)
    found = judged(logits, labels)
    predicted, probs = logits.argmax(axis=1), softmax(logits.astype(np.float64), axis=1)
    assert found.values["top1"] == pytest.approx(reference.accuracy_score(labels, predicted), **EXACT)
    assert found.values["macro_f1"] == pytest.approx(reference.f1_score(labels, predicted, average="macro"), **EXACT)
    assert found.values["mean_per_class_accuracy"] == pytest.approx(reference.balanced_accuracy_score(labels, predicted), **EXACT)
    assert found.values["loss"] == pytest.approx(reference.log_loss(labels, probs), **EXACT)
    assert np.array_equal(found.confusion, reference.confusion_matrix(labels, predicted))
    one_hot = np.eye(n_classes)[labels]
    assert found.values["brier"] == pytest.approx(np.square(probs - one_hot).sum(axis=1).mean(), **EXACT)
    precision, recall, f1, support = reference.precision_recall_fscore_support(labels, predicted)
    assert [row.precision for row in found.per_class] == pytest.approx(list(precision), **EXACT)
    assert [row.recall for row in found.per_class] == pytest.approx(list(recall), **EXACT)
    assert [row.f1 for row in found.per_class] == pytest.approx(list(f1), **EXACT)
    assert [row.n for row in found.per_class] == list(support)
    assert found.n == n == sum(row.n_predicted for row in found.per_class)


def test_brier_equals_scikit_learn_for_several_classes() -> None:
    logits, labels = made_up()
    theirs = reference.brier_score_loss(
        labels, softmax(logits.astype(np.float64), axis=1), scale_by_half=False, labels=list(range(7))
    )
    assert judged(logits, labels).values["brier"] == pytest.approx(theirs, **EXACT)


def test_top5_equals_scikit_learn_and_is_not_shown_where_it_can_only_be_right() -> None:
    logits, labels = made_up(n_classes=12)
    found = judged(logits, labels)
    assert "top5" in [metric.key for metric in found.shown]
    assert found.values["top5"] == pytest.approx(reference.top_k_accuracy_score(labels, logits, k=5), **EXACT)
    few_logits, few_labels = made_up(n_classes=5)
    few = judged(few_logits, few_labels)
    assert few.values["top5"] == 1.0
    assert "top5" not in [metric.key for metric in few.shown]


def test_the_reliability_bins_equal_scikit_learn_and_the_ece_is_their_weighted_gap() -> None:
    logits, labels = made_up(2000)
    found = judged(logits, labels)
    confidence = softmax(logits.astype(np.float64), axis=1).max(axis=1)
    accuracy, mean_confidence = calibration_curve(logits.argmax(axis=1) == labels, confidence, n_bins=15)
    filled = [b for b in found.bins if b.n]
    assert len(found.bins) == 15
    assert len(filled) == len(accuracy) > 8
    assert [b.accuracy for b in filled] == pytest.approx(list(accuracy), **EXACT)
    assert [b.confidence for b in filled] == pytest.approx(list(mean_confidence), **EXACT)
    weights = np.array([b.n for b in filled]) / 2000
    assert found.values["ece"] == pytest.approx(float((weights * np.abs(accuracy - mean_confidence)).sum()), **EXACT)


@pytest.mark.parametrize(("n_correct", "n"), [(0, 10), (10, 10), (1, 3), (290, 341)])
def test_the_interval_of_top1_is_wilsons(n_correct: int, n: int) -> None:
    theirs = binomtest(n_correct, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson_interval(n_correct, n) == pytest.approx((theirs.low, theirs.high), **EXACT)


def test_a_class_without_images_is_named_and_left_out_of_the_means() -> None:
    logits, labels = made_up(400, 6)
    labels[labels == 4] = 3
    found = judged(logits, labels)
    predicted, present = logits.argmax(axis=1), [0, 1, 2, 3, 5]
    assert found.absent == ("class 4",)
    row = found.per_class[4]
    assert (row.n, row.recall, row.f1) == (0, None, None)
    assert row.n_predicted > 0
    assert row.precision == 0.0
    theirs = reference.f1_score(labels, predicted, labels=present, average="macro")
    assert found.values["macro_f1"] == pytest.approx(theirs, **EXACT)
    recalls = reference.recall_score(labels, predicted, labels=present, average=None)
    assert found.values["mean_per_class_accuracy"] == pytest.approx(recalls.mean(), **EXACT)


def test_a_label_that_was_never_given_has_no_precision_but_counts_as_missed() -> None:
    logits = np.array([[3, 0, 0], [2, 0, 1], [0, 0, 5]], dtype=np.float32)
    found = evaluate(table(logits, np.array([0, 1, 2]), ("cat", "dog", "owl")))
    assert found.per_class[1].precision is None
    assert (found.per_class[1].recall, found.per_class[1].f1) == (0.0, 0.0)
    assert found.values["mean_per_class_accuracy"] == pytest.approx(2 / 3)


def test_ties_go_to_the_first_class_in_top1_and_in_top5() -> None:
    logits = np.zeros((1, 8), dtype=np.float32)
    first, sixth = (judged(logits, np.array([label])) for label in (0, 5))
    assert (first.values["top1"], first.values["top5"]) == (1.0, 1.0)
    assert (sixth.values["top1"], sixth.values["top5"]) == (0.0, 0.0)


def test_huge_logits_neither_overflow_nor_warn() -> None:
    with np.errstate(all="raise", under="ignore"):
        found = evaluate(table(np.array([[3e38, -3e38], [1e4, 0]], dtype=np.float32), np.array([1, 0]), ("a", "b")))
    assert found.values["loss"] == pytest.approx(3e38, rel=1e-6)
    assert found.values["top1"] == 0.5


def test_more_images_than_one_block_give_the_same_figures() -> None:
    logits, labels = made_up(9000, 5)
    found = judged(logits, labels)
    assert found.values["loss"] == pytest.approx(reference.log_loss(labels, softmax(logits.astype(np.float64), axis=1)), **EXACT)
    assert np.array_equal(found.confusion, reference.confusion_matrix(labels, logits.argmax(axis=1)))


def test_metric_keys_are_the_ones_that_everything_else_reads() -> None:
    evaluation = judged(*made_up())
    found = evaluation.metrics("val")
    assert sorted(found) == [
        "val/brier", "val/ece", "val/loss", "val/macro_f1", "val/mean_per_class_accuracy", "val/n", "val/top1", "val/top1_high",
        "val/top1_low", "val/top5",
    ]  # fmt: skip
    assert (found["val/top1_low"], found["val/top1_high"]) == wilson_interval(round(found["val/top1"] * 500), 500)
    assert found["val/n"] == 500.0


def test_a_judgement_survives_its_file_unchanged(tmp_path: Path) -> None:
    found = judged(*made_up(60, 9))
    for evaluation in (RunEvaluation({"val": found}), RunEvaluation({"val": found}, fit_softmax_temperature(*made_up(60, 9)))):
        write_evaluation(tmp_path / "evaluation.json", evaluation)
        assert read_evaluation(tmp_path / "evaluation.json") == evaluation
    assert Evaluation.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_confused_pairs_are_counted_and_ordered() -> None:
    logits = np.eye(3, dtype=np.float32)[[1, 1, 2, 0, 1]]
    found = evaluate(table(logits, np.array([0, 0, 1, 0, 1]), ("cat", "dog", "owl")))
    assert found.confused_pairs(10) == [("cat", "dog", 2), ("dog", "owl", 1)]
    assert found.confused_pairs(1) == [("cat", "dog", 2)]


def test_mistakes_come_most_confident_first_and_never_include_a_right_answer() -> None:
    logits, labels = made_up(300, 4)
    mistakes = confident_mistakes(table(logits, labels), 1000)
    probs = softmax(logits.astype(np.float64), axis=1)
    wrong = np.flatnonzero(logits.argmax(axis=1) != labels)
    assert len(wrong) > 20
    assert sorted(m.index for m in mistakes) == list(wrong)
    assert [m.confidence for m in mistakes] == sorted((m.confidence for m in mistakes), reverse=True)
    for mistake in mistakes:
        assert mistake.true == f"class {labels[mistake.index]}" != mistake.predicted
        assert mistake.confidence == pytest.approx(probs[mistake.index].max(), **EXACT)
        assert mistake.true_probability == pytest.approx(probs[mistake.index, labels[mistake.index]], **EXACT)
    assert confident_mistakes(table(logits, labels), 3) == mistakes[:3]


def test_the_temperature_is_the_one_that_a_scalar_optimiser_finds() -> None:
    logits, labels = made_up(1500, 6, scale=6.0)

    def nll(log_temperature: float) -> float:
        scaled = log_softmax(logits.astype(np.float64) / np.exp(log_temperature), axis=1)
        return -float(scaled[np.arange(len(labels)), labels].mean())

    theirs = minimize_scalar(nll, bounds=(-4, 4), method="bounded", options={"xatol": 1e-10})
    found = fit_softmax_temperature(logits, labels)
    assert found.temperature == pytest.approx(np.exp(theirs.x), rel=1e-6)
    assert found.nll_after == pytest.approx(theirs.fun, rel=1e-12)
    assert found.nll_after < found.nll_before == pytest.approx(nll(0.0), **EXACT)
    assert found.ece_after < found.ece_before
    assert not found.at_limit


def test_logits_that_are_too_sharp_by_a_factor_get_that_factor_back() -> None:
    logits, labels = made_up(800, 5)
    once = fit_softmax_temperature(logits, labels)
    again = fit_softmax_temperature(logits * 4, labels)
    assert again.temperature == pytest.approx(4 * once.temperature, rel=1e-9)
    assert again.nll_after == pytest.approx(once.nll_after, rel=1e-12)


def test_a_temperature_without_a_best_value_says_that_it_stopped_at_its_limit() -> None:
    always_right = np.array([[2, 0], [0, 2]], dtype=np.float32)
    found = fit_softmax_temperature(always_right, np.array([0, 1]))
    assert found.at_limit
    assert found.temperature == pytest.approx(0.01)
    flat = fit_softmax_temperature(np.zeros((3, 2), dtype=np.float32), np.array([0, 1, 1]))
    assert (flat.temperature, flat.at_limit) == (1.0, False)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "says"),
    [
        (np.zeros((2, 3)), np.array([0]), InvalidInput, r"shape \(2, 3\)"),
        (np.zeros((2, 4)), np.array([0, 1]), InvalidInput, "3 classes"),
        (np.zeros((0, 3)), np.zeros(0, dtype=int), InvalidInput, "holds no image"),
        (np.zeros((2, 3)), np.array([0, 3]), InvalidInput, "numbered 0 to 2"),
        (np.array([[0, np.nan, 0]]), np.array([0]), TrainingError, "1 of 1 images have NaN"),
        (np.array([[0, 0, 0], [0, np.inf, 0]]), np.array([0, 0]), TrainingError, "first: row 1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_the_reason(logits, labels, error, says) -> None:
    with pytest.raises(error, match=says):
        evaluate(table(logits, labels, names(3)))
