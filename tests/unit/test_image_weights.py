"""Weights that the data gives its images count in the training loss of every method and in nothing else, or are refused."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import local_sample
from formats import coco, imagenet_lists, label_studio
from numpy.typing import NDArray
from tiny_runs import carry_out_at, tiny_spec, write_stripes

from finetune.bundle.card import model_card
from finetune.bundle.manifest import read_manifest
from finetune.data.dataset import Sample
from finetune.data.index import index_dataset
from finetune.data.reading import Columns, Reading
from finetune.errors import DataError, InvalidInput
from finetune.evaluation.predictions import read
from finetune.features.sigmoid_head import solve_sigmoid_head
from finetune.features.softmax_head import solve_softmax_head
from finetune.features.solve import SolvedHead
from finetune.storage.files import read_json
from finetune.storage.rundir import RunDir
from finetune.tasks.balance import Balance, balance_of
from finetune.training.image_weights import image_weights, weight_facts
from finetune.training.mixing import mix, partners
from finetune.training.objectives import objective_of

CLASSES = ("ash", "beech", "cedar")
LABELS = np.repeat([0, 1, 2], [40, 20, 10])


def samples(weights: list[float], labels: list[int]) -> list[Sample]:
    return [
        replace(local_sample(Path(f"{number}.jpg"), label), weight=weight)
        for number, (weight, label) in enumerate(zip(weights, labels, strict=True))
    ]


def features(labels: NDArray[np.int64] = LABELS, views: int = 1) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    found = np.eye(3)[labels][:, None] * 1.5 + rng.normal(size=(len(labels), views, 3))
    return (found if views > 1 else found[:, 0]).astype(np.float32)


def same(head: SolvedHead, other: SolvedHead) -> bool:
    return np.allclose(head.weight, other.weight, atol=1e-3) and np.allclose(head.bias, other.bias, atol=1e-3)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("l2", [0.1, 1e-3])
def test_an_image_of_weight_two_is_an_image_that_is_there_twice(views: int, l2: float) -> None:
    given = features(views=views)
    twice = np.arange(0, len(LABELS), 3)
    weights = np.ones(len(LABELS))
    weights[twice] = 2.0
    weighted = solve_softmax_head(given, LABELS, 3, l2=l2, image_weights=weights / weights.mean())
    doubled = solve_softmax_head(np.concatenate([given, given[twice]]), np.concatenate([LABELS, LABELS[twice]]), 3, l2=l2)
    assert same(weighted, doubled)
    assert not same(weighted, solve_softmax_head(given, LABELS, 3, l2=l2))


def test_it_is_so_for_several_labels_and_a_weight_of_nothing_leaves_an_image_out() -> None:
    given, targets = features(), np.eye(3, dtype=np.uint8)[LABELS] | np.eye(3, dtype=np.uint8)[(LABELS + 1) % 3]
    weights = np.tile([2.0, 1.0, 0.0, 1.0, 1.0], len(LABELS) // 5)
    weighted = solve_sigmoid_head(given, targets, 3, l2=0.01, image_weights=weights)
    order = np.repeat(np.arange(len(LABELS)), weights.astype(int))
    assert same(weighted, solve_sigmoid_head(given[order], targets[order], 3, l2=0.01))


@pytest.mark.parametrize("kind", ["none", "balanced"])
def test_steps_come_to_what_is_solved(kind: str) -> None:
    """The loss that steps take is the loss that is solved: at the solution its gradient is zero."""
    balance = balance_of(LABELS, 3, kind, 0.0)  # type: ignore[arg-type]
    weights = np.linspace(0.0, 4.0, len(LABELS))
    head = solve_softmax_head(features(), LABELS, 3, l2=1e-6, class_weights=balance.weights, image_weights=weights)
    weight, bias = torch.tensor(head.weight, requires_grad=True), torch.tensor(head.bias, requires_grad=True)
    targets, given = torch.tensor(LABELS), torch.tensor(weights / weights.mean(), dtype=torch.float32)
    objective = objective_of("multiclass").balanced(balance)
    objective.loss(torch.tensor(features()) @ weight.T + bias, targets, targets, 1.0, 0.0, (given, given)).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert float(weight.grad.abs().max()) < 1e-3
    assert float(bias.grad.abs().max()) < 1e-3


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("loss", ["plain", "asymmetric"])
def test_weights_of_one_give_the_loss_without_weights_and_each_target_has_its_images_weight(task: str, loss: str) -> None:
    objective = objective_of(task)
    if loss == "asymmetric":
        objective = objective.minimising("asymmetric")
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    targets, others = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([2, 1, 0, 2, 1, 0])
    if task == "multilabel":
        targets, others = torch.eye(3)[targets], torch.eye(3)[others]
    ones = torch.ones(6)
    plain = objective.loss(logits, targets, others, 0.3, 0.1)
    assert float(objective.loss(logits, targets, others, 0.3, 0.1, (ones, ones))) == pytest.approx(float(plain))
    own, other = torch.tensor([2.0, 0, 0, 0, 0, 0]), torch.tensor([0, 0, 0, 0, 0, 3.0])
    one = objective.loss(logits[[0]], targets[[0]], targets[[0]], 1.0, 0.1)
    last = objective.loss(logits[[5]], others[[5]], others[[5]], 1.0, 0.1)
    expected = (0.3 * 2 * one + 0.7 * 3 * last) / 6
    assert float(objective.loss(logits, targets, others, 0.3, 0.1, (own, other))) == pytest.approx(float(expected))


def test_the_partners_of_mixup_are_those_that_are_blended_in() -> None:
    targets = torch.arange(8)
    _, other, share = mix(torch.rand(8, 3, 4, 4), targets, 0.4, seed=5)
    order, same_share = partners(8, 0.4, seed=5)
    assert other.tolist() == order.tolist()
    assert share == same_share


def test_weights_are_one_on_average_together_with_those_of_the_classes() -> None:
    weights = [1.0, 3.0, 0.5, 0.0, 2.0, 1e300]
    labels = np.array([0, 0, 0, 1, 1, 2])
    found = image_weights(samples(weights, labels.tolist()), CLASSES, Balance())
    assert found is not None
    assert found.mean() == pytest.approx(1.0)
    assert found[1] == pytest.approx(6 * found[2])
    balance = balance_of(labels, 3, "balanced", 0.0)
    assert balance.weights is not None
    found = image_weights(samples([1.0, 3.0, 0.5, 0.0, 2.0, 1.0], labels.tolist()), CLASSES, balance)
    assert found is not None
    assert (found * balance.weights[labels]).mean() == pytest.approx(1.0)


def test_equal_weights_change_nothing() -> None:
    labels = [0, 1, 2]
    for weight in (1.0, 0.25):
        assert weight_facts(samples([weight] * 3, labels), CLASSES) is None
        assert image_weights(samples([weight] * 3, labels), CLASSES, Balance()) is None
    facts = weight_facts(samples([1.0, 1.0, 0.0, 4.0], [0, 1, 0, 2]), CLASSES)
    assert facts is not None
    assert (facts.least, facts.largest, facts.n_zero, facts.effective_n) == (0.0, 4.0, 1, pytest.approx(36 / 18))


def test_weights_that_leave_nothing_to_learn_are_refused() -> None:
    with pytest.raises(DataError, match="all 2 training images have the weight 0, so there is nothing to train with"):
        weight_facts(samples([0.0, 0.0], [0, 1]), CLASSES)
    with pytest.raises(DataError, match="every training image of beech has the weight 0"):
        weight_facts(samples([1.0, 0.0, 0.0, 1.0], [0, 1, 1, 2]), CLASSES)


@pytest.mark.parametrize(
    ("write", "what"), [(coco, "COCO files"), (label_studio, "Label Studio exports"), (imagenet_lists, "lists of files")]
)
def test_a_column_of_weights_is_refused_where_the_format_has_none(write, what: str, tmp_path: Path) -> None:
    place = write(tmp_path, {None: {"ash": 2, "beech": 2}})
    with pytest.raises(DataError, match=rf"data.weight_column: 'w' is given, but {what} have no such column"):
        index_dataset(place, reading=Reading(columns=Columns(weight="w")))


def table(pictures: Path, name: str, weight_of) -> Path:
    """Write a table of striped pictures beside their class folders, with a weight for each."""
    path = pictures.parent / f"{name}.csv"
    rows = [
        [f"{pictures.name}/{file.parent.name}/{file.name}", file.parent.name, weight_of(number)]
        for number, file in enumerate(sorted(pictures.glob("*/*")))
    ]
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["file_name", "label", "w"], *rows])
    return path


@pytest.mark.longer
@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("method", ["linear_probe", {"type": "partial", "train": ["head"]}])
def test_weights_reach_the_model_and_are_written_down_and_weights_of_one_change_no_bit(method, tmp_path: Path) -> None:
    pictures = write_stripes(tmp_path, 60)
    steps = {} if method == "linear_probe" else {"hyperparameters": {"n_epochs": 2}}
    answers, runs = {}, {}
    for name, weight_of, column in (
        ("plain", lambda number: 1, None),
        ("ones", lambda number: "1.0", "w"),
        ("unequal", lambda number: number % 4, "w"),
    ):
        data = {"label_column": "label", **({"weight_column": column} if column else {})}
        spec = tiny_spec(table(pictures, name, weight_of), method=method, data=data, export={"register_model": "always"}, **steps)
        runs[name] = RunDir(tmp_path / "runs" / name)
        carry_out_at(tmp_path, spec, runs[name])
        answers[name] = read(runs[name].predictions_of("test"))
    assert answers["ones"].logits.tobytes() == answers["plain"].logits.tobytes()
    assert answers["unequal"].ids == answers["plain"].ids, "weights do not change the split"
    assert not np.allclose(answers["unequal"].logits, answers["plain"].logits, atol=1e-4)
    resolved = read_json(runs["unequal"].resolved)
    assert resolved["dataset"]["weights"]["largest"] == 3.0
    assert resolved["values"]["data.weight_column"].startswith("w: 0 to 3, ")
    manifest = read_manifest(runs["unequal"].bundle)
    assert manifest.method["image_weights"] == resolved["values"]["data.weight_column"]
    assert "image_weights: w: 0 to 3" in model_card(manifest)
    assert read_json(runs["ones"].resolved)["dataset"]["weights"] is None
    assert "image_weights" not in read_manifest(runs["ones"].bundle).method


def test_the_study_of_labels_refuses_weights(tmp_path: Path) -> None:
    from tiny_runs import shared_at

    from finetune.studies.labels.study import study_labels

    spec = tiny_spec(write_stripes(tmp_path, 6), data={"weight_column": "w"})
    with pytest.raises(InvalidInput, match="the labels study counts every image once"):
        study_labels(spec, shared_at(tmp_path))
