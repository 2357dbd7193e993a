"""Classes of different size: what weights and adjusted logits are, and that solved and stepped training mean the same by them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from finetune.errors import SpecError
from finetune.features.softmax_head import solve_softmax_head
from finetune.spec import parse_spec
from finetune.tasks.balance import Balance, ClassWeights, balance_of
from finetune.training.objectives import objective_of

LABELS = np.repeat([0, 1, 2], [180, 16, 4])


@dataclass(frozen=True)
class Problem:
    features: NDArray[np.float32]
    labels: NDArray[np.int64]


@pytest.fixture(scope="module")
def problem() -> Problem:
    rng = np.random.default_rng(0)
    return Problem((np.eye(3)[LABELS] * 1.5 + rng.normal(size=(len(LABELS), 3))).astype(np.float32), LABELS)


@pytest.mark.parametrize("kind", ["balanced", "effective_number"])
def test_weights_are_one_on_average_and_larger_for_smaller_classes(kind: ClassWeights) -> None:
    weights = balance_of(LABELS, 4, kind, 0.0).weights
    assert weights is not None
    assert weights[LABELS].mean() == pytest.approx(1.0)
    assert weights[0] < weights[1] < weights[2]
    assert weights[3] == 0.0, "a class without images has no weight"
    if kind == "balanced":
        assert weights[2] / weights[0] == pytest.approx(180 / 4)


def test_nothing_is_done_unless_it_is_asked_for() -> None:
    balance = balance_of(LABELS, 3, "none", 0.0)
    assert balance.weights is None
    assert balance.offsets is None
    logits, targets = torch.randn(8, 3), torch.randint(0, 3, (8,))
    plain, same = objective_of("multiclass"), objective_of("multiclass").balanced(balance)
    assert torch.equal(plain.loss(logits, targets, targets, 1.0, 0.1), same.loss(logits, targets, targets, 1.0, 0.1))


def recall(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    predicted = logits.argmax(axis=1)
    return np.array([(predicted[labels == one] == one).mean() for one in np.unique(labels)])


def test_a_solved_head_finds_the_rare_classes_that_it_missed(problem: Problem) -> None:
    plain = solve_softmax_head(problem.features, problem.labels, 3, l2=1e-3)
    weights = balance_of(problem.labels, 3, "balanced", 0.0).weights
    weighted = solve_softmax_head(problem.features, problem.labels, 3, l2=1e-3, class_weights=weights)
    offsets = balance_of(problem.labels, 3, "none", 1.0).offsets
    before, after = (recall(head.logits(problem.features), problem.labels) for head in (plain, weighted))
    adjusted = recall(plain.logits(problem.features) - offsets, problem.labels)
    assert before[2] < after[2]
    assert before.mean() + 0.1 < after.mean()
    assert before.mean() + 0.1 < adjusted.mean()


@pytest.mark.parametrize("asked", [{"class_weights": "balanced"}, {"logit_adjustment": 1.0}])
def test_steps_come_to_what_is_solved(asked: dict[str, object], problem: Problem) -> None:
    """The loss that steps take is the loss that is solved: at the solution its gradient is zero."""
    balance = balance_of(problem.labels, 3, asked.get("class_weights", "none"), asked.get("logit_adjustment", 0.0))  # type: ignore[arg-type]
    head = solve_softmax_head(problem.features, problem.labels, 3, l2=1e-6, class_weights=balance.weights)
    bias = head.bias if balance.offsets is None else head.bias - balance.offsets.astype(np.float32)
    weight = torch.tensor(head.weight, requires_grad=True)
    shift = torch.tensor(bias, requires_grad=True)
    targets = torch.tensor(problem.labels)
    objective = objective_of("multiclass").balanced(balance)
    objective.loss(torch.tensor(problem.features) @ weight.T + shift, targets, targets, 1.0, 0.0).backward()
    assert weight.grad is not None
    assert shift.grad is not None
    assert float(weight.grad.abs().max()) < 1e-3
    assert float(shift.grad.abs().max()) < 1e-3


def test_mixed_targets_are_weighted_each_by_its_own_class() -> None:
    logits, targets, others = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([2, 1, 0, 2, 1, 0])
    objective = objective_of("multiclass").balanced(Balance(np.array([0.5, 1.0, 3.0])))
    both = 0.3 * objective.loss(logits, targets, targets, 1.0, 0.0) + 0.7 * objective.loss(logits, others, others, 1.0, 0.0)
    assert float(objective.loss(logits, targets, others, 0.3, 0.0)) == pytest.approx(float(both))


def test_it_is_made_up_for_once() -> None:
    with pytest.raises(SpecError, match="either class_weights or logit_adjustment"):
        parse_spec({"training_file": "photos", "data": {"class_weights": "balanced", "logit_adjustment": 1.0}})


def test_sampling_weighs_the_solved_head_and_not_the_steps() -> None:
    balance = balance_of(LABELS, 3, "sampling", 0.0)
    weighed = balance_of(LABELS, 3, "balanced", 0.0)
    assert balance.weights is not None
    assert weighed.weights is not None
    assert balance.weights.tolist() == weighed.weights.tolist()
    assert balance.sampled
    assert balance.of_steps.weights is None
    assert weighed.of_steps is weighed
