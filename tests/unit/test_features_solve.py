"""The solved head against scikit-learn, against itself under changes that must not matter, and at its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from finetune.errors import TrainingError
from finetune.features.lbfgs import minimise
from finetune.features.softmax_head import solve_softmax_head
from finetune.features.solve import L2_PATH, SolvedHead
from finetune.tasks.balance import balance_of


def blobs(n_images: int, n_features: int, n_classes: int, *, spread: float = 2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping Gaussian classes, on features of very different scales and offsets."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(n_classes, n_features))
    labels = np.arange(n_images) % n_classes
    features = centres[labels] + spread * generator.normal(size=(n_images, n_features))
    features = features * 10.0 ** generator.uniform(-2, 2, n_features) + generator.normal(size=n_features)
    return features.astype(np.float32), labels


@pytest.mark.parametrize("n_val", [0, 40])
def test_a_head_that_may_overwrite_its_features_has_the_same_bits(n_val: int) -> None:
    chance = np.random.default_rng(0)
    labels = chance.integers(0, 3, 120)
    matrix = (chance.normal(size=(240 + n_val, 8)) + np.eye(8)[np.append(np.repeat(labels, 2), labels[:n_val])]).astype(
        np.float32
    )
    given = matrix.copy()

    def solve(rows: np.ndarray, overwrite: np.ndarray | None) -> SolvedHead:
        val = {"val_features": rows[240:], "val_targets": labels[:n_val]} if n_val else {}
        return solve_softmax_head(rows[:240].reshape(120, 2, 8), labels, 3, overwrite=overwrite, **val)

    plain, in_place = solve(given, None), solve(matrix, matrix)
    np.testing.assert_array_equal(in_place.weight, plain.weight)
    np.testing.assert_array_equal(in_place.bias, plain.bias)
    assert in_place.path == plain.path
    assert not np.array_equal(matrix, given), "it was overwritten"
    with pytest.raises(ValueError, match="does not hold"):
        solve(given, matrix[1:])


def test_it_finds_the_same_optimum_as_scikit_learn() -> None:
    features, labels = blobs(300, 20, 4)
    head = solve_softmax_head(features, labels, 4, l2=0.03)
    standardised = (features - features.mean(axis=0)) / features.std(axis=0)
    trusted = LogisticRegression(C=1 / (0.03 * 300), tol=1e-8, max_iter=5000).fit(standardised.astype(np.float64), labels)
    logits = head.logits(features)
    expected = trusted.decision_function(standardised)
    centred = logits - logits.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(centred, expected - expected.mean(axis=1, keepdims=True), atol=5e-3)
    assert head.converged
    assert head.chosen_by == "given"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_of_the_stated_objective_vanishes_at_the_solution(smoothing: float) -> None:
    features, labels = blobs(200, 15, 3)
    head = solve_softmax_head(features, labels, 3, l2=0.01, label_smoothing=smoothing)
    x = torch.from_numpy(features.astype(np.float64))
    std, mean = torch.std_mean(x, dim=0, correction=0)
    weight = (torch.from_numpy(head.weight).double() * std).requires_grad_()  # for standardised features
    bias = (torch.from_numpy(head.bias).double() + torch.from_numpy(head.weight).double() @ mean).requires_grad_()
    logits = (x - mean) / std @ weight.T + bias
    mean_loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), label_smoothing=smoothing)
    (mean_loss + 0.5 * 0.01 * (weight**2).sum()).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert float(weight.grad.abs().max()) < 1e-4
    assert float(bias.grad.abs().max()) < 1e-4
    assert head.converged
    assert head.gradient_norm < 2e-4


def test_rescaled_and_shifted_features_give_the_same_logits() -> None:
    features, labels = blobs(200, 10, 3)
    scale, shift = np.logspace(-3, 3, 10).astype(np.float32), np.linspace(-5, 5, 10).astype(np.float32)
    plain = solve_softmax_head(features, labels, 3).logits(features)
    rescaled = solve_softmax_head(features * scale + shift * scale, labels, 3).logits(features * scale + shift * scale)
    np.testing.assert_allclose(plain, rescaled, atol=2e-2)
    np.testing.assert_array_equal(plain.argmax(axis=1), rescaled.argmax(axis=1))


def test_two_solutions_of_the_same_problem_are_bit_identical() -> None:
    features, labels = blobs(200, 10, 3)
    first, second = solve_softmax_head(features, labels, 3), solve_softmax_head(features, labels, 3)
    assert first.weight.tobytes() == second.weight.tobytes()
    assert first.bias.tobytes() == second.bias.tobytes()


def test_the_strength_is_the_one_with_the_least_validation_loss() -> None:
    features, labels = blobs(120, 60, 3, spread=4.0)
    val_features, val_labels = features[:60], labels[:60]
    head = solve_softmax_head(features[60:], labels[60:], 3, val_features=val_features, val_targets=val_labels)
    assert head.chosen_by == "validation"
    assert 3 <= len(head.path) <= len(L2_PATH)
    assert head.l2 == min(head.path, key=lambda point: point.val_nll).l2
    for point in head.path:
        alone = solve_softmax_head(features[60:], labels[60:], 3, l2=point.l2)
        nll = torch.nn.functional.cross_entropy(torch.from_numpy(alone.logits(val_features)), torch.from_numpy(val_labels))
        assert float(nll) == pytest.approx(point.val_nll, abs=0.02)


def test_validation_rows_do_not_influence_the_fit() -> None:
    features, labels = blobs(150, 10, 3)
    alone = solve_softmax_head(features[:100], labels[:100], 3, l2=0.01)
    judged = solve_softmax_head(features[:100], labels[:100], 3, l2=0.01, val_features=features[100:], val_targets=labels[100:])
    np.testing.assert_allclose(alone.logits(features), judged.logits(features), atol=1e-3)


def test_without_validation_every_image_is_judged_by_a_fit_that_did_not_see_it() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(60, 200)).astype(np.float32)  # noise, which any fit can learn by heart
    labels = np.arange(60) % 2
    head = solve_softmax_head(features, labels, 2)
    assert head.chosen_by == "cross-validation"
    assert (head.logits(features).argmax(axis=1) == labels).mean() > 0.9
    assert head.held_out_logits is not None
    np.testing.assert_array_equal(head.held_out_images, np.arange(60))
    assert (head.held_out_logits.argmax(axis=1) == labels).mean() < 0.75


def test_repeating_each_image_as_views_changes_nothing() -> None:
    features, labels = blobs(90, 10, 3)
    once = solve_softmax_head(features, labels, 3)
    thrice = solve_softmax_head(np.repeat(features[:, None], 3, axis=1), labels, 3)
    assert once.l2 == thrice.l2
    np.testing.assert_allclose(once.logits(features), thrice.logits(features), atol=0.02)


def test_views_of_a_held_out_image_are_held_out_with_it() -> None:
    generator = np.random.default_rng(0)
    images = generator.normal(size=(40, 1, 100))
    views = (images + 0.01 * generator.normal(size=(40, 4, 100))).astype(np.float32)
    head = solve_softmax_head(views, np.arange(40) % 2, 2)  # labels are noise: only a leak between views could predict them
    assert max(point.val_score for point in head.path) < 0.8


def test_class_weights_act_like_repeated_images() -> None:
    features, labels = blobs(60, 5, 2)
    twice = np.concatenate([features, features[labels == 1]])
    weighted = solve_softmax_head(features, labels, 2, l2=1e-4, class_weights=np.array([1.0, 2.0]))
    repeated = solve_softmax_head(twice, np.concatenate([labels, labels[labels == 1]]), 2, l2=1e-4)
    np.testing.assert_allclose(weighted.logits(features), repeated.logits(features), atol=0.1)


def test_balanced_weights_give_every_class_the_same_mass() -> None:
    labels = np.array([0] * 90 + [1] * 9 + [3])
    weights = balance_of(labels, 4, "balanced", 0.0).weights
    assert weights is not None
    np.testing.assert_allclose(weights[labels].mean(), 1.0)
    np.testing.assert_allclose(weights[[0, 1, 3]] * [90, 9, 1], 100 / 3)
    assert weights[2] == 0.0


def test_a_constant_feature_gets_no_weight() -> None:
    features, labels = blobs(100, 6, 2)
    features[:, 2], features[:, 4] = 1e4, 0.0
    head = solve_softmax_head(features, labels, 2)
    assert not head.weight[:, [2, 4]].any()
    assert np.isfinite(head.weight).all()
    without = solve_softmax_head(np.delete(features, [2, 4], axis=1), labels, 2)
    np.testing.assert_allclose(head.logits(features), without.logits(np.delete(features, [2, 4], axis=1)), atol=1e-3)


def test_separable_data_gives_finite_weights_and_no_errors() -> None:
    features, labels = blobs(100, 50, 2, spread=0.1)
    head = solve_softmax_head(features, labels, 2)
    assert (head.logits(features).argmax(axis=1) == labels).all()
    assert np.isfinite(head.weight).all()


def test_one_image_per_class_is_enough() -> None:
    features, labels = blobs(3, 8, 3)
    head = solve_softmax_head(features, labels, 3)
    assert head.chosen_by == "default"
    assert head.held_out_logits is None
    np.testing.assert_array_equal(head.logits(features).argmax(axis=1), labels)


def test_a_class_without_images_is_never_predicted() -> None:
    features, labels = blobs(60, 5, 2)
    head = solve_softmax_head(features, labels * 2, 4)  # classes 1 and 3 are absent
    assert set(head.logits(features).argmax(axis=1)) == {0, 2}
    assert np.isfinite(head.bias).all()


def test_features_that_are_not_finite_are_refused_by_row() -> None:
    features, labels = blobs(20, 5, 2)
    features[7, 3] = np.nan
    with pytest.raises(TrainingError, match="not finite"):
        solve_softmax_head(features, labels, 2)


def test_the_minimiser_reaches_a_known_minimum() -> None:
    curvature, centre = np.logspace(0, 4, 20), np.linspace(-1, 1, 20)

    def quadratic(point: np.ndarray) -> tuple[float, np.ndarray, float]:
        gradient = curvature * (point - centre)
        return 1.0 + 0.5 * float((gradient * (point - centre)).sum()), gradient, float((gradient**2).sum()) / 2.0

    found = minimise(quadratic, np.zeros(20), 1e-10)
    assert found.converged
    np.testing.assert_allclose(found.parameters, centre, atol=1e-4, rtol=0)
