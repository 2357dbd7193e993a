"""Carry out one recipe: the head solved on frozen features, optimiser steps, or the one and then the other.

Brings together the solved head (`finetune.features.solve`), the frozen prefix (`finetune.features.rows`) and the training loop
(`finetune.train.fit`), which do not know each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.data.augment import Augment
from finetune.data.dataset import Dataset, Sample, targets_of
from finetune.data.loader import Batch, EvalLoader, TrainLoader
from finetune.data.pixels import PixelStore
from finetune.events import HeadSolved, PrefixPlanned, SettingsMeasured
from finetune.features.prefix import GraphSource
from finetune.features.rows import FeatureContext, Views, plan_prefix, pooled_features
from finetune.features.solve import SolvedHead, head_logits
from finetune.model.classifier import Classifier
from finetune.model.freeze import apply_freeze, frozen_digest
from finetune.progress import Progress, ProgressCallback, silent
from finetune.storage.files import write_atomic
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store
from finetune.tasks import Task
from finetune.train.choices import Choices
from finetune.train.compute import Compute
from finetune.train.fit import Fitted, Forward, Prepare, Saving, TrainBatches, fit, forward_images
from finetune.train.machine import Numerics, choose_numerics, prepare_images
from finetune.train.measurements import write_neighbours, write_sample_answers
from finetune.train.objectives import objective_of
from finetune.train.recipe import Recipe, widest_plan
from finetune.train.replay import ForwardFrom, cached_activations, prepare_activation
from finetune.train.sample import LARGEST, TrainSample, choose_sample, plan_sample


@dataclass(frozen=True)
class TrainingContext:
    """What all training of one run shares: on what, where, and who is told.

    Args:
        dataset: the train split is learnt from, the val split chooses.
        identity: what makes this run this run (``spec``, ``dataset`` -> digest); checkpoints of another are refused.
        store: where frozen features and decoded photographs are kept.
        graph: gives the classifier, as it is then, as one ONNX file; spares the prefix engine an export of its own.
        sample_size: training images that are answered now and then as evaluation would; None: as many as cost little.
    """

    dataset: Dataset
    task: Task
    augment: Augment
    run: RunDir
    compute: Compute
    identity: Mapping[str, str]
    store: Store
    graph: GraphSource | None = None
    progress: ProgressCallback = silent
    sample_size: int | None = None

    def features(self, progress: ProgressCallback | None = None) -> FeatureContext:
        """Return what the frozen prefix is computed with."""
        return FeatureContext(
            self.store,
            self.compute.device,
            self.compute.threads,
            graph=self.graph,
            progress=progress or self.progress,
            event=self.run.record,
        )

    def targets(self, samples: tuple[Sample, ...]) -> NDArray[Any]:
        """Return the labels of samples, encoded by the task."""
        return self.task.encode(targets_of(samples), len(self.dataset.classes))


@dataclass(frozen=True)
class Trained:
    """What training came to; the classifier holds the chosen weights and is in eval mode."""

    recipe: Recipe  # that was carried out
    summary: str  # one sentence
    seconds: float  # of all attempts at the steps
    n_steps: int
    n_trainable: int  # parameters, the head's included
    frozen: Mapping[str, Any]  # which stages never trained, and the sha256 of their parameters and buffers before and after
    choices: Choices
    head: SolvedHead | None  # None where it was not solved, or in an earlier session
    history: tuple[Mapping[str, Any], ...] = field(repr=False, default=())  # the lines of metrics.jsonl

    @property
    def only_the_head(self) -> bool:
        """Whether the backbone is as it was pretrained."""
        return not self.n_steps


def train(classifier: Classifier, recipe: Recipe, context: TrainingContext, decided: Choices | None = None) -> Trained:
    """Train `classifier` in place, as `recipe` says, or go on where an earlier session of the same run stopped.

    Args:
        decided: what an earlier run chose; then nothing is chosen here, and the dataset needs no val split.
    """
    began = time.perf_counter()
    apply_freeze(classifier, widest_plan(recipe))
    before = frozen_digest(classifier)
    solver = _HeadSolver(recipe, context)
    fitted: Fitted | None = None
    if recipe.n_steps:
        fitted = _take_steps(classifier, recipe, context, decided, solver)
    else:
        # an attempt that was killed may have solved it before
        write_atomic(context.run.metrics, lambda stream: stream.write(b""))
        solver(classifier)
    classifier.eval()
    apply_freeze(classifier, widest_plan(recipe))
    return Trained(
        recipe=recipe,
        summary=_summary(recipe, solver.head, fitted),
        seconds=fitted.seconds if fitted else time.perf_counter() - began,
        n_steps=fitted.n_steps if fitted else 0,
        n_trainable=sum(parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad),
        frozen={
            "stages": [stage.name for stage in classifier.backbone.stages if stage.index not in recipe.trainable],
            "digest_before": before,
            "digest_after": frozen_digest(classifier),
        },
        choices=fitted.choices if fitted else Choices(l2=solver.head.l2 if solver.head else None),
        head=solver.head,
        history=fitted.history if fitted else (),
    )


def solved_outputs(
    classifier: Classifier, samples: tuple[Sample, ...], context: TrainingContext
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return logits (N, C) and embeddings (N, D) of a classifier whose backbone never trained, from cached features."""
    features = pooled_features(classifier, samples, Views(classifier.backbone.preprocess), context.features())
    weight, bias = (parameter.detach().numpy() for parameter in (classifier.head.weight, classifier.head.bias))
    return head_logits(features, weight, bias), features


@dataclass
class _HeadSolver:
    """Puts the solved head into a classifier, and remembers how it was found."""

    recipe: Recipe
    context: TrainingContext
    head: SolvedHead | None = None

    def __call__(self, classifier: Classifier) -> None:
        train, val = self.context.dataset.of("train"), self.context.dataset.of("val")
        seen = Views(classifier.backbone.preprocess)
        # steps bring the augmentation; the head before them needs none
        n_views = 1 if self.recipe.n_steps else self.recipe.views
        views = replace(seen, augment=self.context.augment, count=n_views) if n_views > 1 else seen
        features = self._features(classifier, train, views, "training")
        val_features = self._features(classifier, val, seen, "validation") if val else None
        head = objective_of(self.context.task.name).solve_head(
            features,
            self.context.targets(train),
            classifier.num_classes,
            val_features=val_features,
            val_targets=self.context.targets(val) if val else None,
            l2=self.recipe.l2,
            label_smoothing=self.recipe.label_smoothing if not self.recipe.n_steps else 0.0,
            seed=self.recipe.seed,
        )
        with torch.no_grad():
            classifier.head.weight.copy_(torch.from_numpy(head.weight))
            classifier.head.bias.copy_(torch.from_numpy(head.bias))
        self._record(head)
        self._measure(classifier, head, features if n_views == 1 else features[:, 0], val_features)
        self.head = head

    def _measure(
        self, classifier: Classifier, head: SolvedHead, features: NDArray[np.float32], val_features: NDArray[np.float32] | None
    ) -> None:
        """Write down what the diagnosis needs and only the features tell."""
        context = self.context
        train, val, test = (context.dataset.of(split) for split in ("train", "val", "test"))
        if not self.recipe.n_steps:  # else the training loop answers the sample itself
            chosen = choose_sample(train, context.sample_size or LARGEST)
            write_sample_answers(context.run, context.task, context.dataset, chosen, 0, head.logits(features[chosen]))
        held_out = [(val, val_features)] if val_features is not None else []
        if test and context.compute.device == "cpu":  # where the check of the files has computed the features of all images
            seen = Views(classifier.backbone.preprocess)
            held_out.append((test, self._features(classifier, test, seen, "test")))
        write_neighbours(context.run, context.dataset, (train, features), held_out)

    def _features(self, classifier: Classifier, samples: tuple[Sample, ...], views: Views, what: str) -> NDArray[np.float32]:
        def progress(update: Progress) -> None:
            self.context.progress(replace(update, message=f"features, {what}"))

        return pooled_features(classifier, samples, views, self.context.features(progress))

    def _record(self, head: SolvedHead) -> None:
        values = {"head/l2": head.l2, "head/seconds": head.seconds, "head/iterations": float(head.iterations)}
        if not self.recipe.n_steps:  # before steps the training loop evaluates the head itself
            for point in head.path:
                if point.l2 == head.l2:
                    values |= {"val/loss": point.val_nll, f"val/{self.context.task.headline.key}": point.val_score}
        self.context.run.metric(0, values, epoch=0.0)
        path = [{"l2": point.l2, "val_nll": point.val_nll, "val_score": point.val_score} for point in head.path]
        message = f"the head is solved: L2 {head.l2:g} ({head.chosen_by}), {head.iterations} passes, {head.seconds:.1f} s"
        self.context.run.record(HeadSolved(message, path, head.converged))


def _take_steps(
    classifier: Classifier, recipe: Recipe, context: TrainingContext, decided: Choices | None, solver: _HeadSolver
) -> Fitted:
    """Run the training loop: on cached activations where a frozen prefix stands before what trains, else on images."""

    def numerics() -> Numerics:
        if decided is not None:
            return Numerics(**(decided.numerics or {}))
        return _measured_numerics(classifier, recipe, context)

    source = _cached_source(classifier, recipe, context) or _image_source(classifier, recipe, context)
    dataset = context.dataset
    return fit(
        classifier,
        recipe,
        source.train,
        source.val if decided is None else decided,
        context.run,
        Saving(context.identity),
        task=context.task,
        objective=objective_of(context.task.name),
        train_targets=context.targets(dataset.of("train")),
        val_targets=context.targets(dataset.of("val")),
        numerics=numerics,
        solve_head=solver,
        sample=_train_sample(classifier, recipe, context, source),
        prepare=source.prepare,
        forward=source.forward,
        progress=context.progress,
    )


def _train_sample(classifier: Classifier, recipe: Recipe, context: TrainingContext, source: _BatchSource) -> TrainSample:
    train = context.dataset.of("train")
    plan = plan_sample(recipe, train, classifier.backbone.preprocess.input_size_px, context.sample_size)

    def keep(step: int, logits: NDArray[np.float32]) -> None:
        write_sample_answers(context.run, context.task, context.dataset, plan.indices, step, logits)

    return TrainSample(plan, source.sample(plan.indices), keep)


def _measured_numerics(classifier: Classifier, recipe: Recipe, context: TrainingContext) -> Numerics:
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
class _BatchSource:
    """Where batches come from, and how one of them becomes logits."""

    train: TrainBatches
    val: Iterable[Batch]
    sample: Callable[[NDArray[np.int64]], Iterable[Batch]]  # these training images, as evaluation sees them
    prepare: Prepare
    forward: Forward


def _image_source(classifier: Classifier, recipe: Recipe, context: TrainingContext) -> _BatchSource:
    train, val, threads = context.dataset.of("train"), context.dataset.of("val"), context.compute.threads
    augment = context.augment.at_size(recipe.train_size_px)
    pixels = PixelStore(context.store)

    def batches(epoch: int, start_step: int) -> Iterable[Batch]:
        return TrainLoader(train, augment, recipe.batch_size, recipe.seed, epoch, start_step, threads, pixels)

    def sample(indices: NDArray[np.int64]) -> Iterable[Batch]:
        return evaluated([train[index] for index in indices])

    def evaluated(samples: Sequence[Sample]) -> EvalLoader:
        return EvalLoader(samples, classifier.backbone.preprocess, recipe.batch_size, threads, pixels)

    return _BatchSource(batches, evaluated(val), sample, prepare_images, forward_images)


def _cached_source(classifier: Classifier, recipe: Recipe, context: TrainingContext) -> _BatchSource | None:
    """Return batches of what enters the first stage that trains; None where that is the image, or it does not fit the disk."""
    if recipe.mixup or classifier.aux is not None:  # both need the images themselves
        return None
    train, val, features = context.dataset.of("train"), context.dataset.of("val"), context.features()
    seen = Views(classifier.backbone.preprocess)
    views = replace(seen, augment=context.augment, count=recipe.views)
    plan = plan_prefix(classifier, min(recipe.trainable), train, val, views, features, measure=False)
    context.run.record(PrefixPlanned(str(plan)))
    if plan.stage is None:
        return None
    trained_on = cached_activations(classifier, plan.stage, train, replace(views, count=plan.views), features)
    judged_on = cached_activations(classifier, plan.stage, val, seen, features)  # none where nothing is chosen
    if trained_on is None or judged_on is None:
        return None
    batches, evaluated = trained_on.train_batches(recipe.batch_size, recipe.seed), judged_on.eval_batches(recipe.batch_size)
    sample = partial(trained_on.eval_batches, recipe.batch_size)
    return _BatchSource(batches, evaluated, sample, prepare_activation, ForwardFrom(plan.stage))


def _summary(recipe: Recipe, head: SolvedHead | None, fitted: Fitted | None) -> str:
    if fitted is not None:
        stopped = ", stopped early" if fitted.stopped_early else ""
        return f"{recipe.method}: {fitted.n_steps} steps{stopped}; keeps {fitted.chosen}"
    assert head is not None
    return f"{recipe.method}: the head is solved on frozen features, L2 {head.l2:g} ({head.chosen_by})"
