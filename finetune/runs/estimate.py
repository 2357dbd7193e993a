"""What a recipe will take, before it is carried out: measured on a few images and steps on this machine, then multiplied."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data.augment import Augment
from finetune.data.dataset import Dataset
from finetune.features.rows import PrefixPlan, Resources, Views, plan_prefix
from finetune.model.classifier import Classifier
from finetune.storage.store import Store
from finetune.train.machine import MEASURED_IMAGES, measure
from finetune.train.methods import Compute
from finetune.train.recipe import Recipe

_FORWARD_SHARE = 1 / 3  # of a training step: the backward pass takes twice the forward pass


@dataclass(frozen=True)
class Estimate:
    """About how much; `prefix` says in words what is computed once and what of it is in the cache already."""

    seconds: float
    memory_bytes: float
    cache_bytes: float
    prefix: str


def estimate(
    classifier: Classifier,
    recipes: Sequence[Recipe],
    dataset: Dataset,
    augment: Augment,
    compute: Compute,
    store: Store,
    *,
    rounds: int = 1,
) -> Estimate:
    """The sum over `recipes`. Export, evaluation on test and the report come on top, a matter of seconds.

    Args:
        rounds: how often each is carried out, as for folds; what is computed once is computed once for all of them.
    """
    parts = [_of_one(classifier, recipe, dataset, augment, compute, store, rounds) for recipe in recipes]
    return Estimate(
        seconds=math.fsum(part.seconds for part in parts),
        memory_bytes=max(part.memory_bytes for part in parts),
        cache_bytes=max(part.cache_bytes for part in parts),
        prefix="; ".join(dict.fromkeys(part.prefix for part in parts)),
    )


def _of_one(
    classifier: Classifier, recipe: Recipe, dataset: Dataset, augment: Augment, compute: Compute, store: Store, rounds: int
) -> Estimate:
    train, val = dataset.of("train"), dataset.of("val")
    views = Views(classifier.backbone.preprocess, augment, recipe.views)
    resources = Resources(store, compute.device, compute.threads)
    n_stages = len(classifier.backbone.stages)
    cuts = [n_stages] if recipe.solves_head_first else []
    if recipe.n_steps and recipe.trainable and recipe.trainable[0] > 0:
        cuts.append(recipe.trainable[0])
    plans: list[PrefixPlan] = [plan_prefix(classifier, cut, train, val, views, resources) for cut in cuts]
    seconds = math.fsum(plan.seconds or 0.0 for plan in plans)
    memory_bytes = _peak_memory_bytes()
    if recipe.n_steps:
        (timing,) = measure(classifier, recipe, [compute.plain_settings()])
        n_steps_images = recipe.n_steps * recipe.batch_size
        seconds += rounds * (n_steps_images + recipe.n_epochs * len(val) * _FORWARD_SHARE) / timing.images_per_second
        of_a_step = max(_peak_memory_bytes() - memory_bytes, 0.0)
        memory_bytes += of_a_step * max(recipe.batch_size / min(recipe.batch_size, MEASURED_IMAGES), 1.0)
    said = "; ".join(str(plan) for plan in plans) or "nothing is computed once: every stage trains from the first step"
    return Estimate(seconds, memory_bytes, float(sum(plan.n_bytes for plan in plans)), said)


def _peak_memory_bytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
