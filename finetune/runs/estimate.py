"""Estimate the time and memory of a run's training before it starts, by measuring a few images and steps on this machine.

`finetune.runs.forecast` predicts the time of the whole job.
"""

from __future__ import annotations

import math
import resource
from dataclasses import dataclass

from finetune.features.plan import PrefixPlan, plan_prefix
from finetune.features.rows import FeatureContext, Views
from finetune.runs.prepare import Prepared, augment_of, built_network
from finetune.runs.shared import Shared
from finetune.training.machine import MEASURED_IMAGES, measure, plain_numerics

_FORWARD_SHARE = 1 / 3  # of the time of a training step: the backward pass takes about twice as long as the forward pass


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a run.

    Args:
        cache_bytes: disk space for the features that are still to be computed and cached.
        prefix: in words, which features are computed once and which of them are already cached.
    """

    seconds: float
    memory_bytes: float
    cache_bytes: float
    prefix: str


def estimate(prepared: Prepared, shared: Shared, *, rounds: int = 1) -> Estimate:
    """Estimate the cost of training one run. Export, evaluation on test and the report take a few seconds more.

    Args:
        rounds: number of trainings on the same images, such as the folds of a cross-validation; cached features are computed
            once for all of them.
    """
    resolved, dataset = prepared.resolved, prepared.dataset
    recipe, compute = resolved.recipe, resolved.compute
    network = built_network(resolved.spec, dataset, shared)
    classifier = network.classifier
    train, val = dataset.of("train"), dataset.of("val")
    views = Views(resolved.preprocess, augment_of(resolved, shared.store), recipe.views)
    context = FeatureContext(shared.store, compute.device, compute.threads)
    n_stages = len(classifier.backbone.stages)
    cuts = [n_stages] if recipe.solves_head_first else []
    if recipe.n_steps and recipe.trainable and recipe.trainable[0] > 0:
        cuts.append(recipe.trainable[0])
    plans: list[PrefixPlan] = [plan_prefix(classifier, cut, train, val, views, context, graph=network.untrained) for cut in cuts]
    seconds = math.fsum(plan.seconds or 0.0 for plan in plans)
    memory_bytes = _peak_memory_bytes()
    if recipe.n_steps:
        (timing,) = measure(classifier, recipe, [plain_numerics(compute)])
        n_steps_images = recipe.n_steps * recipe.batch_size
        seconds += rounds * (n_steps_images + recipe.n_epochs * len(val) * _FORWARD_SHARE) / timing.images_per_second
        of_a_step = max(_peak_memory_bytes() - memory_bytes, 0.0)
        memory_bytes += of_a_step * max(recipe.batch_size / min(recipe.batch_size, MEASURED_IMAGES), 1.0)
    text = "; ".join(str(plan) for plan in plans) or "no features are cached: every stage trains from the first step"
    return Estimate(seconds, memory_bytes, float(sum(plan.n_bytes for plan in plans)), text)


def together(estimates: list[Estimate]) -> Estimate:
    """Return the estimate for runs that are carried out one after another."""
    return Estimate(
        seconds=math.fsum(part.seconds for part in estimates),
        memory_bytes=max(part.memory_bytes for part in estimates),
        cache_bytes=max(part.cache_bytes for part in estimates),
        prefix="; ".join(dict.fromkeys(part.prefix for part in estimates)),
    )


def _peak_memory_bytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
