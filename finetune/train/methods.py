"""One recipe, carried out: the head solved on frozen features, steps taken, or the one and then the other.

Brings together the solved head (`probe`), the frozen prefix (`features`) and the training loop (`fit`), which do not know each
other.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from finetune.data.augment import Augment
from finetune.data.dataset import Dataset, Sample
from finetune.data.loader import Batch, EvalLoader, TrainLoader
from finetune.data.pixels import PixelStore
from finetune.model.classifier import Classifier
from finetune.model.freeze import apply_freeze, frozen_digest
from finetune.progress import Progress, ProgressCallback, silent
from finetune.storage.files import write_atomic
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store
from finetune.train.features import Resources, Views, plan_prefix, pooled_features
from finetune.train.fit import Fitted, Forward, Prepare, Saving, TrainBatches, fit, forward_images
from finetune.train.machine import Settings, choose_settings, prepare_images
from finetune.train.prefix import GraphSource
from finetune.train.probe import Probe, solve_probe
from finetune.train.recipe import Recipe, refit_recipe, widest_plan
from finetune.train.replay import ForwardFrom, cached_activations, prepare_activation


@dataclass(frozen=True)
class Compute:
    """Where it is computed, resolved from the request and the machine."""

    device: Literal["cpu", "cuda"]
    precision: Literal["auto", "float32", "bfloat16"]
    threads: int

    def plain_settings(self) -> Settings:
        """Float32, for what is computed once and compared."""
        return Settings(self.device, "float32", threads=self.threads)


@dataclass(frozen=True)
class Context:
    """What all training of one run shares: on what, where, and who is told.

    Args:
        dataset: the train split is learnt from, the val split chooses.
        identity: what makes this run this run (``spec``, ``dataset`` -> digest); checkpoints of another are refused.
        graph: gives the classifier, as it is then, as one ONNX file; spares the prefix engine an export of its own.
    """

    dataset: Dataset
    augment: Augment
    run: RunDir
    compute: Compute
    identity: Mapping[str, str]
    store: Store
    graph: GraphSource | None = None
    progress: ProgressCallback = silent

    def resources(self, progress: ProgressCallback | None = None) -> Resources:
        """What the frozen prefix is computed with."""
        compute = self.compute
        return Resources(
            self.store,
            compute.device,
            compute.threads,
            graph=self.graph,
            progress=progress or self.progress,
            event=self.run.event,
        )


@dataclass(frozen=True)
class Trained:
    """What training came to; the classifier holds the chosen weights and is in eval mode."""

    summary: str  # one sentence
    seconds: float
    n_steps: int
    n_trainable: int  # parameters, the head's included
    frozen: Mapping[str, Any]  # which stages never trained, and the sha256 of their parameters and buffers before and after
    probe: Probe | None
    fitted: Fitted | None
    recipe: Recipe  # that was carried out; of several that were tried the kept one's

    @property
    def l2(self) -> float | None:
        """The strength that the head was solved with, also where an earlier session of this run solved it."""
        if self.probe is not None:
            return self.probe.l2
        journal = self.fitted.history if self.fitted else ()
        return next((line["values"]["probe/l2"] for line in journal if "probe/l2" in line["values"]), None)


def train_classifier(classifier: Classifier, recipe: Recipe, context: Context, decided: Fitted | None = None) -> Trained:
    """Train `classifier` in place, as `recipe` says.

    Args:
        decided: where the dataset has no val split, what the steps come to is not chosen but as in this earlier run.
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
    n_trainable = sum(parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad)
    frozen_stages = [stage.name for stage in classifier.backbone.stages if stage.index not in recipe.trainable]
    return Trained(
        summary=_summary(recipe, solver.probe, fitted),
        seconds=time.perf_counter() - began,
        n_steps=fitted.n_steps if fitted else 0,
        n_trainable=n_trainable,
        frozen={"stages": frozen_stages, "digest_before": before, "digest_after": frozen_digest(classifier)},
        probe=solver.probe,
        fitted=fitted,
        recipe=recipe,
    )


def refit(classifier: Classifier, trained: Trained, context: Context) -> Trained:
    """Train `classifier`, which has the weights that `trained` began with, on train and val together; nothing is chosen any more.

    The head is solved with the L2 strength, and steps are taken for the epochs, that val has chosen; where val has chosen weights
    between start and end, or fresh running statistics, these are taken again. What `trained` tells of the choice stays told.
    """
    dataset, run = context.dataset, context.run
    both = replace(dataset, samples=tuple(replace(sample, split="train") for sample in dataset.samples if sample.split != "test"))
    again = replace(
        context,
        dataset=both,
        run=RunDir(run.root / "refit").create(),
        identity={**context.identity, "refit": both.digest},
    )
    refitted = train_classifier(
        classifier, refit_recipe(trained.recipe, len(both.samples), trained.l2), again, decided=trained.fitted
    )
    summary = f"{trained.summary}; then fitted once more on train + val with what val chose"
    run.event("refitted", f"fitted once more on the {len(both.samples):,} images of train and val, as val has chosen")
    return replace(trained, summary=summary, seconds=trained.seconds + refitted.seconds, frozen=refitted.frozen)


def solved_logits(classifier: Classifier, samples: tuple[Sample, ...], context: Context) -> np.ndarray:
    """(N, C) float32 logits of a classifier whose backbone never trained: its head on features that are cached, or will be."""
    features = pooled_features(classifier, samples, Views(classifier.backbone.preprocess), context.resources())
    with torch.no_grad():
        logits: np.ndarray = classifier.head(torch.from_numpy(features)).numpy()
    return logits


@dataclass
class _HeadSolver:
    """Puts the solved head into a classifier, and remembers how it was found."""

    recipe: Recipe
    context: Context
    probe: Probe | None = None

    def __call__(self, classifier: Classifier) -> None:
        train, val = self.context.dataset.of("train"), self.context.dataset.of("val")
        seen = Views(classifier.backbone.preprocess)
        # steps bring the augmentation; the head before them needs none
        n_views = 1 if self.recipe.n_steps else self.recipe.views
        views = replace(seen, augment=self.context.augment, count=n_views) if n_views > 1 else seen
        probe = solve_probe(
            self._features(classifier, train, views, "training"),
            _labels(train),
            classifier.num_classes,
            val_features=self._features(classifier, val, seen, "validation") if val else None,
            val_labels=_labels(val) if val else None,
            l2=self.recipe.l2,
            label_smoothing=self.recipe.label_smoothing if not self.recipe.n_steps else 0.0,
            seed=self.recipe.seed,
        )
        with torch.no_grad():
            classifier.head.weight.copy_(torch.from_numpy(probe.weight))
            classifier.head.bias.copy_(torch.from_numpy(probe.bias))
        self._record(probe)
        self.probe = probe

    def _features(self, classifier: Classifier, samples: tuple[Sample, ...], views: Views, what: str) -> np.ndarray:
        def progress(update: Progress) -> None:
            self.context.progress(replace(update, message=f"features, {what}"))

        return pooled_features(classifier, samples, views, self.context.resources(progress))

    def _record(self, probe: Probe) -> None:
        values = {"probe/l2": probe.l2, "probe/seconds": probe.seconds, "probe/iterations": float(probe.iterations)}
        if not self.recipe.n_steps:  # before steps the training loop evaluates the head itself
            for point in probe.path:
                if point.l2 == probe.l2:
                    values |= {"val/loss": point.val_nll, "val/top1": point.val_top1}
        self.context.run.metric(0, values, epoch=0.0)
        path = [{"l2": point.l2, "val_nll": point.val_nll, "val_top1": point.val_top1} for point in probe.path]
        message = f"the head is solved: L2 {probe.l2:g} ({probe.chosen_by}), {probe.iterations} passes, {probe.seconds:.1f} s"
        self.context.run.event("head_solved", message, path=path, converged=probe.converged)


def _take_steps(classifier: Classifier, recipe: Recipe, context: Context, decided: Fitted | None, solver: _HeadSolver) -> Fitted:
    """Run the training loop: on cached activations where a frozen prefix stands before what trains, else on images."""
    compute, run, progress = context.compute, context.run, context.progress

    def settings() -> Settings:
        if decided is not None:
            return decided.settings
        measuring = Progress("preparing", 0, 1, "measurements", message="timing this machine")
        progress(measuring)
        chosen, timings = choose_settings(
            classifier, recipe, device=compute.device, precision=compute.precision, threads=compute.threads
        )
        if timings:
            rates = [{**timing.settings.to_dict(), "images_per_second": timing.images_per_second} for timing in timings]
            run.event("settings_measured", f"fastest on this machine: {chosen}", timings=rates)
        progress(replace(measuring, done=1))
        return chosen

    source = _cached_source(classifier, recipe, context) or _image_source(classifier, recipe, context)
    return fit(
        classifier,
        recipe,
        source.train,
        source.val if decided is None else decided.decided,
        run,
        Saving(context.identity),
        settings=settings,
        solve_head=solver,
        prepare=source.prepare,
        forward=source.forward,
        progress=progress,
    )


@dataclass(frozen=True)
class _Source:
    """Where batches come from, and how one of them becomes logits."""

    train: TrainBatches
    val: Iterable[Batch]
    prepare: Prepare
    forward: Forward


def _image_source(classifier: Classifier, recipe: Recipe, context: Context) -> _Source:
    train, val, threads = context.dataset.of("train"), context.dataset.of("val"), context.compute.threads
    augment = context.augment.at_size(recipe.train_size_px)
    pixels = PixelStore(context.store)

    def batches(epoch: int, start_step: int) -> Iterable[Batch]:
        return TrainLoader(train, augment, recipe.batch_size, recipe.seed, epoch, start_step, threads, pixels)

    evaluated = EvalLoader(val, classifier.backbone.preprocess, recipe.batch_size, threads, pixels)
    return _Source(batches, evaluated, prepare_images, forward_images)


def _cached_source(classifier: Classifier, recipe: Recipe, context: Context) -> _Source | None:
    """Batches of what enters the first stage that trains; None where that is the image, or it does not fit the disk."""
    if recipe.mixup or classifier.aux is not None:  # both need the images themselves
        return None
    train, val, resources = context.dataset.of("train"), context.dataset.of("val"), context.resources()
    seen = Views(classifier.backbone.preprocess)
    views = replace(seen, augment=context.augment, count=recipe.views)
    plan = plan_prefix(classifier, min(recipe.trainable), train, val, views, resources, measure=False)
    context.run.event("prefix", str(plan))
    if plan.stage is None:
        return None
    trained_on = cached_activations(classifier, plan.stage, train, replace(views, count=plan.views), resources)
    judged_on = cached_activations(classifier, plan.stage, val, seen, resources)  # a refit has none
    if trained_on is None or judged_on is None:
        return None
    batches, evaluated = trained_on.train_batches(recipe.batch_size, recipe.seed), judged_on.eval_batches(recipe.batch_size)
    return _Source(batches, evaluated, prepare_activation, ForwardFrom(plan.stage))


def _labels(samples: tuple[Sample, ...]) -> np.ndarray:
    return np.array([sample.target for sample in samples], dtype=np.int64)


def _summary(recipe: Recipe, probe: Probe | None, fitted: Fitted | None) -> str:
    if fitted is not None:
        stopped = ", stopped early" if fitted.stopped_early else ""
        return f"{recipe.method}: {fitted.n_steps} steps{stopped}; keeps {fitted.chosen}"
    assert probe is not None
    return f"{recipe.method}: the head is solved on frozen features, L2 {probe.l2:g} ({probe.chosen_by})"
