"""Carry out a recipe that takes optimiser steps, with or without a solved head before them.

This module connects the solved head (`finetune.training.head`), the frozen prefix (`finetune.features.rows`) and the training
loop (`finetune.training.fit`), which do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.data.loader import Batch, EvalLoader, TrainLoader
from finetune.data.pixels import PixelStore
from finetune.data.processes import ViewProcesses
from finetune.events import PrefixPlanned, SettingsMeasured
from finetune.features.engine import GraphSource
from finetune.features.plan import plan_prefix
from finetune.features.prefix import embedding_prefix
from finetune.features.rows import Views
from finetune.features.solve import SolvedHead
from finetune.model.classifier import Classifier
from finetune.model.freeze import apply_freeze, frozen_digest
from finetune.progress import Progress
from finetune.runtime.seconds import Seconds
from finetune.training.choices import Choices
from finetune.training.compute import view_processes
from finetune.training.context import Trained, TrainingContext, TrainingCost
from finetune.training.evaluator import Forward, Prepare, forward_images
from finetune.training.final_weights import TrainBatches
from finetune.training.fit import fit
from finetune.training.head import features_of_head, solve_head
from finetune.training.machine import Numerics, choose_numerics, prepare_images
from finetune.training.measurements import write_sample_predictions
from finetune.training.objectives import objective_of
from finetune.training.recipe import Recipe, widest_plan
from finetune.training.replay import ForwardFrom, cached_activations, prepare_activation
from finetune.training.sample import TrainSample, plan_sample
from finetune.training.state import CheckpointSchedule, Fitted


def train(
    classifier: Classifier,
    recipe: Recipe,
    context: TrainingContext,
    decided: Choices | None = None,
    graph: GraphSource | None = None,
) -> Trained:
    """Train `classifier` in place as `recipe` says, or resume the training that an earlier attempt at the same run began.

    Afterwards the classifier has the chosen weights and is in eval mode.

    Args:
        decided: what an earlier run chose on its validation images; then nothing is chosen here, and the dataset needs no val
            split.
        graph: returns the untrained classifier as an ONNX file; without it the frozen prefix is exported once more.
    """
    apply_freeze(classifier, widest_plan(recipe))
    before = frozen_digest(classifier)
    solver = _HeadSolver(recipe, context, graph)
    fitted, activations = _take_steps(classifier, recipe, context, decided, solver)
    classifier.eval()
    apply_freeze(classifier, widest_plan(recipe))
    stopped = ", stopped early" if fitted.stopped_early else ""
    return Trained(
        summary=f"{recipe.method}: {fitted.n_steps} steps{stopped}; the model has {fitted.chosen}",
        cost=TrainingCost(fitted.seconds, features_of_head(fitted.history) + activations),
        n_trainable=sum(parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad),
        n_parameters=sum(parameter.numel() for parameter in classifier.parameters()),
        frozen={
            "stages": [stage.name for stage in classifier.backbone.stages if stage.index not in recipe.trainable],
            "digest_before": before,
            "digest_after": frozen_digest(classifier),
        },
        choices=fitted.choices,
        head=solver.head,
    )


@dataclass
class _HeadSolver:
    """Solves the head of a classifier and copies it into the classifier; `head` is the solution."""

    recipe: Recipe
    context: TrainingContext
    graph: GraphSource | None
    head: SolvedHead | None = None

    def __call__(self, classifier: Classifier) -> Seconds:
        """Solve the head; return the seconds that this took, without those of computing the features."""
        prefix = embedding_prefix(classifier, self.graph)
        self.head, cost = solve_head(prefix, classifier.backbone.preprocess, self.recipe, self.context)
        with torch.no_grad():
            classifier.head.weight.copy_(torch.from_numpy(self.head.weight))
            classifier.head.bias.copy_(torch.from_numpy(self.head.bias))
        return cost.own


def _take_steps(
    classifier: Classifier, recipe: Recipe, context: TrainingContext, decided: Choices | None, solver: _HeadSolver
) -> tuple[Fitted, Seconds]:
    """Run the training loop, on cached activations if there is a frozen prefix and they fit on the disk, else on images.

    Returns:
        The result of training, and the seconds that computing the activations takes.
    """
    spent: list[Seconds] = []

    def numerics() -> Numerics:
        if decided is not None:
            return Numerics(**(decided.numerics or {}))
        return _measured_numerics(classifier, recipe, context)

    batches = _cached_batches(classifier, recipe, context, spent.append)
    activations = sum(spent, Seconds()) if batches else Seconds()
    with closing(batches or _image_batches(classifier, recipe, context)) as batches:
        fitted = fit(
            classifier,
            recipe,
            batches.train,
            batches.val if decided is None else decided,
            context.run,
            CheckpointSchedule(context.identity),
            task=context.task,
            objective=objective_of(context.task.name).minimising(recipe.loss).balanced(context.balance.of_steps),
            train_targets=context.targets(context.dataset.of("train")),
            train_weights=context.image_weights,
            val_targets=context.targets(context.dataset.of("val")),
            numerics=numerics,
            solve_head=solver,
            sample=_train_sample(classifier, recipe, context, batches),
            prepare=batches.prepare,
            forward=batches.forward,
            progress=context.progress,
        )
        helpers = batches.cpu_seconds()
    return replace(fitted, seconds=fitted.seconds + Seconds(0.0, helpers)), activations


def _train_sample(classifier: Classifier, recipe: Recipe, context: TrainingContext, batches: _Batches) -> TrainSample:
    train = context.dataset.of("train")
    plan = plan_sample(recipe, train, classifier.backbone.preprocess.input_size_px, context.sample_size)

    def keep(step: int, logits: NDArray[np.float32]) -> None:
        write_sample_predictions(context.run, context.task, context.dataset, plan.indices, step, logits)

    return TrainSample(plan, batches.sample(plan.indices), keep)


def _measured_numerics(classifier: Classifier, recipe: Recipe, context: TrainingContext) -> Numerics:
    """Choose precision, memory layout and threads, and record the timings as an event."""
    compute = context.compute
    measuring = Progress("preparing", 0, 1, "measurements", message="timing this machine")
    context.progress(measuring)
    chosen, timings = choose_numerics(
        classifier, recipe, device=compute.device, precision=compute.precision, threads=compute.threads
    )
    if timings:
        rates = [{**timing.numerics.to_dict(), "images_per_second": timing.images_per_second} for timing in timings]
        context.run.record(SettingsMeasured(f"fastest on this machine: {chosen}", rates))
    context.progress(replace(measuring, done=1))
    return chosen


@dataclass(frozen=True)
class _Batches:
    """The batches of the training loop, and the functions that compute logits from a batch."""

    train: TrainBatches
    val: Iterable[Batch]
    sample: Callable[[NDArray[np.int64]], Iterable[Batch]]  # training images at these positions, preprocessed as for evaluation
    prepare: Prepare
    forward: Forward
    processes: ViewProcesses | None = None  # that compute the training batches

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that processes beside this one took for the batches."""
        return self.processes.cpu_seconds if self.processes else 0.0

    def close(self) -> None:
        if self.processes is not None:
            self.processes.close()


def _image_batches(classifier: Classifier, recipe: Recipe, context: TrainingContext) -> _Batches:
    """Return batches of decoded images: augmented for training, preprocessed for evaluation."""
    train, val, threads = context.dataset.of("train"), context.dataset.of("val"), context.compute.threads
    augment = context.augment.at_size(recipe.train_size_px)
    pixels = PixelStore(context.store)

    loader = TrainLoader(
        train, augment, recipe.batch_size, recipe.seed, threads=threads, pixels=pixels, classes=_sampled_classes(context)
    )
    n_processes = view_processes(context.compute, recipe.n_steps * recipe.batch_size)
    processes = ViewProcesses(loader, n_processes) if n_processes else None

    def batches(epoch: int, start_step: int) -> Iterable[Batch]:
        if processes is not None:
            return processes.batches(epoch, start_step)
        return replace(loader, epoch=epoch, start_step=start_step)

    def sample(indices: NDArray[np.int64]) -> Iterable[Batch]:
        return evaluated([train[index] for index in indices])

    def evaluated(samples: Sequence[Sample]) -> EvalLoader:
        return EvalLoader(samples, classifier.backbone.preprocess, recipe.batch_size, threads, pixels)

    return _Batches(batches, evaluated(val), sample, prepare_images, forward_images, processes)


def _cached_batches(
    classifier: Classifier, recipe: Recipe, context: TrainingContext, spent: Callable[[Seconds], None]
) -> _Batches | None:
    """Return batches of cached inputs of the first trainable stage; None if those are the images, or if the disk has no room."""
    if recipe.mixup or classifier.aux is not None or not recipe.trainable:  # the first two need the images themselves
        return None
    train, val, features = context.dataset.of("train"), context.dataset.of("val"), context.features(spent)
    seen = Views(classifier.backbone.preprocess)
    views = replace(seen, augment=context.augment, count=recipe.views)
    plan = plan_prefix(classifier, min(recipe.trainable), train, val, views, features, measure=False)
    context.run.record(PrefixPlanned(str(plan)))
    if plan.stage is None:
        return None
    trained_on = cached_activations(classifier, plan.stage, train, replace(views, count=plan.views), features)
    validated_on = cached_activations(classifier, plan.stage, val, seen, features)  # without rows if there is no val split
    if trained_on is None or validated_on is None:
        return None
    batches = trained_on.train_batches(recipe.batch_size, recipe.seed, _sampled_classes(context))
    evaluated = validated_on.eval_batches(recipe.batch_size)
    sample = partial(trained_on.eval_batches, recipe.batch_size)
    return _Batches(batches, evaluated, sample, prepare_activation, ForwardFrom(plan.stage))


def _sampled_classes(context: TrainingContext) -> NDArray[np.int64] | None:
    """Return the class of each training image if the request samples classes equally often; else None."""
    return context.targets(context.dataset.of("train")) if context.balance.sampled else None
