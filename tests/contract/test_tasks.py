"""What every task, its objective and its solved head must do, whatever a label means to it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import finetune
from finetune.data.loader import Batch
from finetune.doctor.label_findings import LABEL_FINDINGS
from finetune.errors import InvalidInput, TrainingError
from finetune.evaluation.evaluate import evaluate
from finetune.evaluation.paired import paired_gain
from finetune.evaluation.predictions import Predictions
from finetune.features.heads import HEAD_SOLVERS, head_solver
from finetune.labelling.queries import QUERIES
from finetune.spec import LOSSES, JobSpec
from finetune.tasks import TASKS, Target, Task, task_named
from finetune.training.label_doubts import LABEL_DOUBTS
from finetune.training.objectives import OBJECTIVES, objective_of

N_CLASSES = 4

# How many answers of a shape each task's labels have: what a suite that knows no task draws its labels from.
TARGETS: dict[str, Callable[[np.random.Generator, int], list[Target]]] = {
    "multiclass": lambda chance, n: [int(label) for label in chance.integers(0, N_CLASSES, n)],
    "multilabel": lambda chance, n: [tuple(np.flatnonzero(row).tolist()) for row in chance.random((n, N_CLASSES)) < 0.4],
}


@pytest.fixture(params=TASKS, ids=lambda task: task.name)
def task(request: pytest.FixtureRequest) -> Task:
    return request.param  # type: ignore[no-any-return]


def labelled(task: Task, n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[Target]]:
    """Logits (n, C) float32 that lean towards the labels, the encoded labels, and these as samples have them."""
    chance = np.random.default_rng(seed)
    targets = TARGETS[task.name](chance, n)
    logits = chance.normal(size=(n, N_CLASSES)).astype(np.float32)
    for row, target in enumerate(targets):
        logits[row, [target] if isinstance(target, int) else list(target)] += 1.5
    return logits, task.encode(targets, N_CLASSES), targets


def predictions(task: Task, logits: np.ndarray, targets: np.ndarray) -> Predictions:
    ids = tuple(str(number) for number in range(len(logits)))
    classes = tuple(f"class {number}" for number in range(logits.shape[1]))
    return Predictions("val", task.name, classes, ids, np.zeros((len(ids), 32), np.uint8), targets, logits)


def test_every_task_has_a_name_and_is_registered_in_every_layer_that_differs_between_tasks() -> None:
    names = [task.name for task in TASKS]
    assert len(set(names)) == len(names) >= 1
    assert sorted(objective.task for objective in OBJECTIVES) == sorted(names) == sorted(TARGETS)
    assert sorted(HEAD_SOLVERS) == sorted(LOSSES) == sorted(names)
    assert sorted(LABEL_DOUBTS) == sorted(LABEL_FINDINGS) == sorted(QUERIES) == sorted(names)
    assert all(task.losses == LOSSES[task.name] for task in TASKS)
    assert all(task_named(name).name == objective_of(name).task == name for name in names)


def test_the_job_spec_offers_the_tasks_that_there_are() -> None:
    (field,) = [field for name, field in JobSpec.model_fields.items() if name == "task"]
    assert set(field.annotation.__args__) == {"auto", *(task.name for task in TASKS)}  # type: ignore[union-attr]


def test_a_task_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(
        InvalidInput, match=r"no task 'multiclas'; tasks are multiclass.* Did you mean 'multiclass' or 'multilabel'\?"
    ):
        task_named("multiclas")


def test_the_headline_is_one_of_the_metrics_and_more_of_it_is_better(task: Task) -> None:
    keys = [metric.key for metric in task.metrics]
    assert len(set(keys)) == len(keys)
    assert task.headline in task.metrics
    assert task.mean_score in task.metrics
    assert task.mean_score.interval is not None
    assert task.headline.higher_is_better
    assert task.headline.interval is not None
    assert "loss" in keys, "the loss of every split is reported"
    assert all(metric.label for metric in task.metrics)


def test_targets_are_encoded_one_row_an_image_and_read_back_as_text(task: Task) -> None:
    _, encoded, targets = labelled(task)
    assert len(encoded) == len(targets)
    classes = ["ash", "beech", "cedar", "elm"]
    for target, row in zip(targets, encoded, strict=True):
        text = task.label_text(row, classes)
        assert all(classes[label] in text for label in ([target] if isinstance(target, int) else target))
    assert len(task.encode([], N_CLASSES)) == 0


def test_encoded_targets_say_which_classes_an_image_has_and_by_which_it_is_drawn(task: Task) -> None:
    _, encoded, targets = labelled(task)
    indicators, strata = task.indicators(encoded), task.strata(encoded)
    assert indicators.dtype == np.float64
    assert strata.shape == (len(targets),)
    for target, row, stratum in zip(targets, indicators, strata, strict=True):
        labels = [target] if isinstance(target, int) else list(target)
        assert np.flatnonzero(row).tolist() == labels
        assert stratum in (labels or [N_CLASSES])


def test_a_learning_curve_is_of_metrics_of_the_task(task: Task) -> None:
    logits, encoded, _ = labelled(task)
    rows = task.image_results(logits, encoded)
    found, metrics = task.learning_curve(rows), {metric.key: metric for metric in task.metrics}
    assert next(iter(found)) == task.headline.key
    assert found == pytest.approx({key: metrics[key].compute(rows) for key in found})
    assert [metrics[key].over_classes for key in list(found)[1:]] == [True] * (len(found) - 1)


def test_labels_are_given_from_the_default_thresholds_where_a_task_has_thresholds(task: Task) -> None:
    logits, _, _ = labelled(task)
    default = task.default_thresholds(N_CLASSES)
    assert default is None or len(default) == N_CLASSES
    for probs in task.probabilities(logits):
        assert list(task.predict_labels(probs, None)) == list(task.predict_labels(probs, default))


def test_probabilities_are_probabilities_and_a_temperature_changes_no_order(task: Task) -> None:
    logits, _, _ = labelled(task)
    cold, hot = task.probabilities(logits), task.probabilities(logits, 3.0)
    assert cold.shape == logits.shape
    assert cold.dtype == np.float64
    for probs in (cold, hot):
        assert ((probs >= 0) & (probs <= 1)).all()
    for row in range(len(logits)):
        order = task.ranking(cold[row])
        assert sorted(order) == list(range(N_CLASSES))
        decided = [] if task.default_thresholds(N_CLASSES) else list(task.predict_labels(cold[row], None))
        assert list(order[: len(decided)]) == decided
        assert (np.diff(cold[row][order[len(decided) :]]) <= 0).all()
        assert list(np.argsort(-cold[row], kind="stable")) == list(np.argsort(-hot[row], kind="stable"))
    assert np.abs(hot - 0.5).max() < np.abs(cold - 0.5).max()
    assert list(task.ranking(np.full(N_CLASSES, 0.5))) == list(range(N_CLASSES)), "ties go in class order"


def test_the_score_of_an_image_averages_to_the_metric_of_images_and_right_answers_score_1(task: Task) -> None:
    logits, encoded, _ = labelled(task)
    rows = task.image_results(logits, encoded)
    assert len(rows) == len(logits) == len(rows.score) == len(rows.nll)
    assert ((rows.score >= 0) & (rows.score <= 1)).all()
    assert rows.score.mean() == pytest.approx(task.mean_score.compute(rows))
    assert (rows.nll >= 0).all()
    (loss,) = [metric for metric in task.metrics if metric.key == "loss"]
    assert rows.nll.mean() == pytest.approx(loss.compute(rows))
    best = task.image_results(sure(task, encoded), encoded)
    assert (best.score == 1).all()
    assert task.headline.compute(best) == task.mean_score.compute(best) == 1.0
    assert loss.compute(best) < 1e-6


def sure(task: Task, encoded: np.ndarray) -> np.ndarray:
    """Logits that are right about every label, beyond doubt."""
    one_hot = np.eye(N_CLASSES)[encoded] if encoded.ndim == 1 else encoded
    return (60.0 * one_hot - 30.0).astype(np.float32)


def test_nobody_who_does_not_look_at_the_image_beats_chance(task: Task) -> None:
    _, encoded, _ = labelled(task)
    chance = task.chance(encoded)
    blind = [np.tile(answer, (len(encoded), 1)) for answer in (2 * np.eye(N_CLASSES, dtype=np.float32) - 1)]
    found = [task.headline.compute(task.image_results(logits, encoded)) for logits in blind]
    assert max(found) <= chance + 1e-12
    assert 0 < chance <= 1


def test_every_metric_lies_in_its_bounds_and_in_its_interval(task: Task) -> None:
    seen = 0
    for seed in range(5):
        logits, encoded, _ = labelled(task, n=17, seed=seed)
        rows = task.image_results(logits, encoded)
        for metric in task.metrics:
            value = metric.compute(rows)
            assert 0 <= value <= metric.largest
            assert metric.text(value)
            if metric.interval is not None:
                low, high = metric.interval(rows)
                assert 0 <= low <= value <= high <= metric.largest
            seen += 1
    assert seen == 5 * len(task.metrics)


def test_a_weight_counts_an_image_as_often_as_it_says(task: Task) -> None:
    """The bootstrap draws images with replacement by weighting them."""
    logits, encoded, _ = labelled(task, n=30)
    rows = task.image_results(logits, encoded)
    times = np.random.default_rng(1).integers(0, 4, (3, 30))
    for metric in task.metrics:
        found = metric.weighted(rows, times.astype(np.float64))
        assert metric.weighted(rows, np.ones((1, 30)))[0] == pytest.approx(metric.compute(rows))
        for row, drawn in enumerate(times):
            resampled = task.image_results(np.repeat(logits, drawn, axis=0), np.repeat(encoded, drawn, axis=0))
            assert found[row] == pytest.approx(metric.compute(resampled)), metric.key


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("name", [task.name for task in TASKS])
def test_the_order_of_the_images_changes_no_figure(name: str, seed: int) -> None:
    task = task_named(name)
    logits, encoded, _ = labelled(task, n=12, seed=seed)
    order = np.random.default_rng(seed).permutation(12)
    one, other = evaluate(predictions(task, logits, encoded)), evaluate(predictions(task, logits[order], encoded[order]))
    assert one.values == pytest.approx(other.values, rel=1e-12, abs=1e-12)
    assert one.per_class == other.per_class


def test_the_table_by_class_counts_what_is_there(task: Task) -> None:
    logits, encoded, targets = labelled(task)
    rows = task.image_results(logits, encoded)
    counts = task.class_counts(rows)
    assert len(counts) == N_CLASSES
    for label, (true, predicted, both) in enumerate(counts):
        assert true == sum(label in ([target] if isinstance(target, int) else target) for target in targets)
        assert 0 <= both <= min(true, predicted)
    confusion = task.confusion(rows)
    if confusion is not None:
        matrix = np.array(confusion)
        assert [tuple(column) for column in counts] == list(
            zip(matrix.sum(axis=1), matrix.sum(axis=0), np.diagonal(matrix), strict=True)
        )
    assert sum(part.n for part in task.reliability_bins(rows)) > 0


def test_what_cannot_be_judged_is_refused(task: Task) -> None:
    logits, encoded, _ = labelled(task, n=6)
    with pytest.raises(InvalidInput, match="holds no image"):
        task.image_results(logits[:0], encoded[:0])
    with pytest.raises(InvalidInput):
        task.image_results(logits[:5], encoded)
    for broken in (np.nan, np.inf):
        diverged = logits.copy()
        diverged[2, 1] = broken
        with pytest.raises(TrainingError, match="1 of 6 images have NaN or infinite logits"):
            task.image_results(diverged, encoded)


def test_a_temperature_never_makes_the_likelihood_worse(task: Task) -> None:
    logits, encoded, _ = labelled(task, n=200)
    for scale in (0.2, 1.0, 5.0):
        found = task.fit_temperature(scale * logits, encoded)
        assert found.nll_after <= found.nll_before + 1e-9
        probs = task.probabilities(scale * logits, found.temperature)
        rescaled = task.image_results((scale * logits).astype(np.float64) / found.temperature, encoded)
        assert rescaled.nll.mean() == pytest.approx(found.nll_after, rel=1e-9)
        assert probs.shape == logits.shape


def test_an_evaluation_and_a_comparison_work_from_a_table(task: Task) -> None:
    logits, encoded, _ = labelled(task)
    table = predictions(task, logits, encoded)
    found = evaluate(table)
    assert found.task == task.name
    assert set(found.values) == {metric.key for metric in task.metrics}
    assert set(found.metrics("test")) >= {f"test/{metric.key}" for metric in task.metrics} | {"test/n"}
    gain = paired_gain(predictions(task, sure(task, encoded), encoded), table)
    assert gain.gain == pytest.approx(1 - found.values[task.headline.key])
    assert gain.metric == task.headline.key


# ── the objective ─────────────────────────────────────────────────────────────────────────────────


def test_what_training_counts_as_right_is_what_the_metric_of_images_counts(task: Task) -> None:
    logits, encoded, _ = labelled(task)
    n_correct = float(objective_of(task.name).n_correct(torch.from_numpy(logits), torch.from_numpy(encoded)))
    assert n_correct == pytest.approx(len(logits) * task.mean_score.compute(task.image_results(logits, encoded)))


def test_what_is_exported_are_the_task_s_probabilities(task: Task) -> None:
    logits, _, _ = labelled(task)
    found = objective_of(task.name).probabilities(torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(found, task.probabilities(logits), atol=1e-6)


def test_the_loss_is_the_task_s_likelihood_and_mixes_two_labels_by_their_share(task: Task) -> None:
    objective = objective_of(task.name)
    logits, encoded, _ = labelled(task)
    given, targets = torch.from_numpy(logits), torch.from_numpy(encoded)
    others = targets.flip(0)
    plain = objective.loss(given, targets, others, 1.0, 0.0)
    assert float(plain) == pytest.approx(task.image_results(logits, encoded).nll.mean(), rel=1e-5)
    swapped = objective.loss(given, others, targets, 1.0, 0.0)
    mixed = objective.loss(given, targets, others, 0.3, 0.0)
    assert float(mixed) == pytest.approx(0.3 * float(plain) + 0.7 * float(swapped), rel=1e-5)
    assert float(objective.loss(given, targets, others, 1.0, 0.1)) != pytest.approx(float(plain)), "smoothing does something"
    assert objective.loss(given.bfloat16(), targets, others, 1.0, 0.0).dtype == torch.float32


def test_its_gradient_moves_logits_towards_the_labels(task: Task) -> None:
    objective = objective_of(task.name)
    _, encoded, _ = labelled(task)
    targets = torch.from_numpy(encoded)
    logits = torch.zeros((len(encoded), N_CLASSES), requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=50.0)
    for _ in range(100):
        optimizer.zero_grad()
        objective.loss(logits, targets, targets, 1.0, 0.0).backward()
        optimizer.step()
    assert task.headline.compute(task.image_results(logits.detach().numpy(), encoded)) == 1.0


@pytest.mark.parametrize("judged", [True, False], ids=["by validation", "by cross-validation"])
def test_the_head_is_solved_for_the_task(task: Task, judged: bool) -> None:
    chance = np.random.default_rng(0)
    targets = TARGETS[task.name](chance, 120)
    encoded = task.encode(targets, N_CLASSES)
    directions = chance.normal(size=(N_CLASSES, 12))
    one_hot = np.eye(N_CLASSES)[encoded] if encoded.ndim == 1 else encoded
    features = (one_hot @ directions + 0.3 * chance.normal(size=(120, 12))).astype(np.float32)
    head = head_solver(task.name)(
        features[:90],
        encoded[:90],
        N_CLASSES,
        val_features=features[90:] if judged else None,
        val_targets=encoded[90:] if judged else None,
        l2=None,
        label_smoothing=0.0,
        seed=0,
    )
    assert head.weight.shape == (N_CLASSES, 12)
    assert head.converged
    held_out = features[90:] @ head.weight.T + head.bias
    assert task.headline.compute(task.image_results(held_out, encoded[90:])) > 0.9
    if judged:
        best = next(point for point in head.path if point.l2 == head.l2)
        assert best.val_score == min(head.path, key=lambda point: point.val_nll).val_score
    assert len(head.path) >= 3


# ── one task behind one door ──────────────────────────────────────────────────────────────────────


def test_only_tasks_and_metrics_decide_which_class_an_answer_is() -> None:
    """Top-1 is computed in one place: elsewhere nothing compares the largest logit with a label."""
    root = Path(finetune.__file__).parent
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in sorted(root.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare) and any(_is_argmax(part) for part in ast.walk(node))
    ]
    allowed = ("training/objectives/", "export/agreement.py", "export/dry_run.py")  # the last two compare answers, not labels
    assert [place for place in found if not place.startswith(allowed)] == []
    assert any(place.startswith("training/objectives/") for place in found), "the search finds something"


def test_only_tasks_and_registrations_know_a_task_by_its_name() -> None:
    """No module compares with the name of a task or takes one by its name: what differs is a member, or registered by name."""
    root, names = Path(finetune.__file__).parent, {task.name for task in TASKS}
    found, seen = [], 0
    for folder in (root, root.parent / "service"):
        for path in sorted(folder.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                seen += isinstance(node, ast.Compare)
                if _asked(node) & names:
                    found.append(f"{path.relative_to(root.parent)}:{getattr(node, 'lineno', 0)}")
    assert found == []
    assert seen > 1000, "the search reads the modules"


def _asked(node: ast.AST) -> set[object]:
    """Return the constants that a node compares with, or takes a task by."""
    parts: list[ast.AST] = []
    if isinstance(node, ast.Compare | ast.MatchValue):
        parts = list(ast.walk(node))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "task_named":
        parts = list(node.args)
    return {part.value for part in parts if isinstance(part, ast.Constant)}


def _is_argmax(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "argmax"


def test_batches_carry_no_labels() -> None:
    assert Batch._fields == ("images", "indices"), "what a label means is the task's business, not the loader's"


def test_a_target_of_several_classes_is_no_multiclass_target() -> None:
    several: Sequence[Any] = [0, (1, 2)]
    with pytest.raises(InvalidInput, match="exactly one label per image"):
        task_named("multiclass").encode(several, N_CLASSES)
