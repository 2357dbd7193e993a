"""Judge a trained model: its answers on every split that it was not trained on, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.errors import NoBetterThanChance
from finetune.evaluation.evaluate import UNSEEN, Judgement, evaluate
from finetune.evaluation.predictions import Predictions, digests_as_rows
from finetune.messages import plural
from finetune.metrics.temperature import Temperature
from finetune.runs.learner import Learner
from finetune.tasks import task_named
from finetune.training.context import TrainingContext

MIN_IMAGES_TO_CALIBRATE = 100
LOSS_OF_NONSENSE = 10.0  # times the loss of answering every class with the same probability
N_COMPARED_EMBEDDINGS = 40  # evenly over a table, and so over all folds
N_PARTS = 5  # of the images that thresholds are chosen on, each of which is judged by what the others choose
MIN_IMAGES_TO_REFUSE = 20  # on fewer, a good model is as bad as chance by accident too often


def predict_splits(learner: Learner, context: TrainingContext, splits: Sequence[str]) -> dict[str, Predictions]:
    """Answer every image of these splits, as the exported graph computes it."""
    found = {}
    for split in splits:
        samples = context.dataset.of(split)
        if samples:
            logits, embedding = learner.answer(samples, context, split)
            found[split] = table_of(context, split, samples, logits, embedding)
    return found


def table_of(
    context: TrainingContext,
    split: str,
    samples: tuple[Sample, ...],
    logits: NDArray[np.float32],
    embedding: NDArray[np.float32],
) -> Predictions:
    """Return the answers to `samples` as a table."""
    return Predictions(
        split=split,
        task=context.task.name,
        classes=context.dataset.classes,
        ids=tuple(sample.id for sample in samples),
        sha256=digests_as_rows([sample.sha256 for sample in samples]),
        targets=context.targets(samples),
        logits=logits,
        embedding=embedding,
    )


def decided(
    predictions: Mapping[str, Predictions], given: tuple[float, ...] | None = None
) -> tuple[dict[str, Predictions], tuple[float, ...] | None]:
    """Return the tables with the thresholds from which on labels are given, and these; None where labels exclude each other.

    Where val is answered, each part of its images is given labels by thresholds that were chosen on the other parts.

    Args:
        given: thresholds that another run of the study has chosen; by default they are chosen on val.
    """
    chosen = given if given is not None else thresholds_of(predictions["val"]) if "val" in predictions else None
    if chosen is None:
        return dict(predictions), None
    tables = {
        split: left_out_thresholds(table) if split == "val" else table.with_thresholds(np.asarray(chosen))
        for split, table in predictions.items()
    }
    return tables, chosen


def thresholds_of(table: Predictions) -> tuple[float, ...] | None:
    """Return the logit for each label from which on these held-out answers give it; None where labels exclude each other."""
    found = task_named(table.task).choose_thresholds(table.logits, table.labels)
    return None if found is None else tuple(float(one) for one in found)


def left_out_thresholds(table: Predictions) -> Predictions:
    """Return a table that chooses thresholds, each part of it with those that the other parts choose."""
    part = np.arange(len(table)) % N_PARTS
    rows = np.zeros_like(table.logits)
    for number in range(N_PARTS):
        others = np.flatnonzero(part != number)
        rows[part == number] = thresholds_of(table.take(others)) or 0.0 if len(others) else 0.0
    return table.with_thresholds(rows)


def judge(
    predictions: Mapping[str, Predictions],
    thresholds: tuple[float, ...] | None = None,
    leaked: Mapping[str, frozenset[str]] | None = None,
    class_sizes: Sequence[int] = (),
) -> Judgement:
    """Evaluate every table, and fit the temperature on val.

    Args:
        thresholds: that `decided` gave.
        leaked: ids of images in a split that were trained on; beside such a split's figures stand those without them, under the
            split's name with ``_unseen``.
        class_sizes: images of each class in all splits together.
    """
    evaluations = {split: evaluate(table, class_sizes) for split, table in predictions.items()}
    for split, ids in (leaked or {}).items():
        if split in predictions:
            table = predictions[split]
            unseen = np.array([row for row, name in enumerate(table.ids) if name not in ids], dtype=np.int64)
            if 0 < len(unseen) < len(table):
                evaluations[f"{split}{UNSEEN}"] = evaluate(table.take(unseen), class_sizes)
    return Judgement(evaluations, calibrate(predictions["val"]) if "val" in predictions else None, thresholds)


def calibrate(predictions: Predictions) -> Temperature | None:
    """Fit the temperature on these held-out answers; return None where they are too few, or where no value fits best."""
    if len(predictions) < MIN_IMAGES_TO_CALIBRATE:
        return None
    temperature = task_named(predictions.task).fit_temperature(predictions.logits, predictions.labels)
    return None if temperature.at_limit else temperature


def embeddings_hold(learner: Learner, context: TrainingContext, table: Predictions) -> bool:
    """Return whether the embeddings in a table, which other runs may have made, are those that this model gives.

    The model of a fold, or the one before a refit, has the embeddings of this one only if none of them trained its backbone.
    """
    if table.embedding is None or not len(table):
        return False
    rows = np.linspace(0, len(table) - 1, min(N_COMPARED_EMBEDDINGS, len(table))).round().astype(int)
    sample_of = {sample.id: sample for sample in context.dataset.samples}
    if any(table.ids[row] not in sample_of for row in rows):
        return False
    _, own = learner.answer(tuple(sample_of[table.ids[row]] for row in rows), context, table.split)
    stored = table.embedding[rows]
    return own.shape == stored.shape and bool(np.allclose(own, stored, rtol=1e-2, atol=1e-2 * float(np.abs(stored).max())))


def refuse_nonsense(predictions: Predictions) -> None:
    """Refuse a model that is no better than an answer which does not look at the image.

    Raises:
        NoBetterThanChance: with the figures that say so.
    """
    if len(predictions) >= MIN_IMAGES_TO_REFUSE:
        _refuse(_no_better_than_chance(predictions))


def refuse_diverged(predictions: Predictions) -> None:
    """Refuse a model whose weights have run away: what it says is nothing that could be exported.

    Raises:
        NoBetterThanChance: with the figures that say so.
    """
    _refuse(_divergence(predictions))


def doubt(predictions: Predictions) -> str | None:
    """Return what must be said of a model that is registered although nothing shows that it is better than chance."""
    found = _divergence(predictions)
    if found is None and (found := _no_better_than_chance(predictions)) and len(predictions) < MIN_IMAGES_TO_REFUSE:
        found += f"; {plural(len(predictions), 'image')} say little, so evaluate it on more"
    return found and f"registered without proof that it is better than chance: {found}"


def _refuse(found: str | None) -> None:
    if found is not None:
        raise NoBetterThanChance(
            f"the model is not registered, for it is no better than chance: {found}. Check the labels, try another method or "
            "hyperparameters.learning_rate_multiplier: 0.1; to register it all the same: --set export.register_model=always"
        )


def _divergence(predictions: Predictions) -> str | None:
    evaluation, chance = evaluate(predictions), task_named(predictions.task).chance(predictions.labels)
    loss, uniform = evaluation.values["loss"], task_named(predictions.task).blind_loss(len(predictions.classes))
    surely_better = evaluation.intervals[evaluation.headline][0] > chance  # then it is only far too sure of its mistakes
    if surely_better or loss <= LOSS_OF_NONSENSE * uniform:
        return None
    return (
        f"its loss on the {len(predictions):,} {predictions.split} images is {loss:.3g}; answering at random has {uniform:.3g}, "
        "so training diverged"
    )


def _no_better_than_chance(predictions: Predictions) -> str | None:
    evaluation, chance = evaluate(predictions), task_named(predictions.task).chance(predictions.labels)
    value = evaluation.values[evaluation.headline]
    if not value <= chance < 1.0:
        return None
    return (
        f"its {evaluation.headline} on the {len(predictions):,} {predictions.split} images is {value:.3f}; one answer to all of "
        f"them has {chance:.3f}"
    )
