"""Compare a trained model with chance: refuse to register one that is no better, or warn of it."""

from __future__ import annotations

from finetune.errors import NoBetterThanChance
from finetune.evaluation.evaluate import evaluate
from finetune.evaluation.predictions import Predictions
from finetune.messages import plural
from finetune.tasks import task_named

DIVERGED_LOSS = 10.0  # times the loss of predicting the same probability for every class
MIN_IMAGES_TO_REFUSE = 20  # with fewer images, a good model is too often as bad as chance by accident


def refuse_no_better_than_chance(predictions: Predictions) -> None:
    """Refuse a model that is no better than giving every image the same prediction. Too few images are not judged.

    Raises:
        NoBetterThanChance: the message names the metric and what chance has.
    """
    if len(predictions) >= MIN_IMAGES_TO_REFUSE:
        _refuse(_no_better_than_chance(predictions))


def refuse_diverged(predictions: Predictions) -> None:
    """Refuse a model whose training diverged.

    Raises:
        NoBetterThanChance: the message names the loss and that of random predictions.
    """
    _refuse(_divergence(predictions))


def chance_warning(predictions: Predictions) -> str | None:
    """Return a warning for a model that is registered although it may be no better than chance; None if it is better."""
    found = _divergence(predictions)
    if found is None and (found := _no_better_than_chance(predictions)) and len(predictions) < MIN_IMAGES_TO_REFUSE:
        found += f"; {plural(len(predictions), 'image')} are few, so evaluate it on more"
    return found and f"registered without proof that it is better than chance: {found}"


def _refuse(found: str | None) -> None:
    if found is not None:
        raise NoBetterThanChance(
            f"the model is not registered, because it is no better than chance: {found}. Check the labels, try another method or "
            "hyperparameters.learning_rate_multiplier: 0.1; to register it nevertheless: --set export.register_model=always"
        )


def _divergence(predictions: Predictions) -> str | None:
    """Return a phrase with the loss if training diverged; None if not."""
    evaluation, chance = evaluate(predictions), task_named(predictions.task).chance(predictions.labels)
    loss, uniform = evaluation.values["loss"], task_named(predictions.task).uniform_loss(len(predictions.classes))
    surely_better = evaluation.intervals[evaluation.headline][0] > chance  # a high loss then shows only overconfidence
    if surely_better or loss <= DIVERGED_LOSS * uniform:
        return None
    return (
        f"its loss on the {len(predictions):,} {predictions.split} images is {loss:.3g}; random predictions have {uniform:.3g}, "
        "so training diverged"
    )


def _no_better_than_chance(predictions: Predictions) -> str | None:
    evaluation, chance = evaluate(predictions), task_named(predictions.task).chance(predictions.labels)
    value = evaluation.values[evaluation.headline]
    if not value <= chance < 1.0:
        return None
    return (
        f"its {evaluation.headline} on the {len(predictions):,} {predictions.split} images is {value:.3f}; one prediction "
        f"for all of them has {chance:.3f}"
    )
