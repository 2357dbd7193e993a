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
from finetune.data.index import Dataset, Sample
from finetune.data.loader import Batch, EvalLoader, TrainLoader
from finetune.data.pixels import PixelStore
from finetune.model.classifier import Classifier
from finetune.model.freeze import apply_freeze, frozen_digest
from finetune.progress import Progress, ProgressCallback, silent
from finetune.rundir import RunDir, workspace, write_atomic
from finetune.train.features import Resources, Views, no_event, plan_prefix, pooled_features
from finetune.train.fit import Fitted, Forward, Prepare, Saving, TrainBatches, fit, forward_images
from finetune.train.machine import Settings, choose_settings, prepare_images
from finetune.train.prefix import EventCallback, GraphSource
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


def train_classifier(
    classifier: Classifier,
    recipe: Recipe,
    dataset: Dataset,
    augment: Augment,
    run: RunDir,
    compute: Compute,
    *,
    identity: Mapping[str, str],
    decided: Fitted | None = None,
    graph: GraphSource | None = None,
    progress: ProgressCallback = silent,
) -> Trained:
    """Train `classifier` in place on the train split of `dataset`, choosing on its val split.

    Args:
        decided: where `dataset` has no val split, what the steps come to is not chosen but as in this earlier run.
        identity: what makes this run this run (``spec``, ``dataset`` -> digest); checkpoints of another are refused.
        graph: gives the classifier, as it is then, as one ONNX file; spares the prefix engine an export of its own.
    """
    began = time.perf_counter()
    apply_freeze(classifier, widest_plan(recipe))
    before = frozen_digest(classifier)
    solver = _HeadSolver(recipe, dataset, augment, run, compute, graph, progress)
    fitted: Fitted | None = None
    if recipe.n_steps:
        fitted = _take_steps(classifier, recipe, dataset, augment, run, compute, identity, decided, solver, progress)
    else:
        write_atomic(run.metrics, lambda stream: stream.write(b""))  # an attempt that was killed may have solved it before
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


def refit(
    classifier: Classifier,
    trained: Trained,
    dataset: Dataset,
    augment: Augment,
    run: RunDir,
    compute: Compute,
    *,
    identity: Mapping[str, str],
    graph: GraphSource | None = None,
    progress: ProgressCallback = silent,
) -> Trained:
    """Train `classifier`, which has the weights that `trained` began with, on train and val together; nothing is chosen any more.

    The head is solved with the L2 strength, and steps are taken for the epochs, that val has chosen; where val has chosen weights
    between start and end, or fresh running statistics, these are taken again. What `trained` tells of the choice stays told.
    """
    both = replace(dataset, samples=tuple(replace(sample, split="train") for sample in dataset.samples if sample.split != "test"))
    recipe = refit_recipe(trained.recipe, len(both.samples), trained.l2)
    refitted = train_classifier(
        classifier,
        recipe,
        both,
        augment,
        RunDir(run.root / "refit").create(),
        compute,
        identity={**identity, "refit": both.digest},
        decided=trained.fitted,
        graph=graph,
        progress=progress,
    )
    summary = f"{trained.summary}; then fitted once more on train + val with what val chose"
    run.event("refitted", f"fitted once more on the {len(both.samples):,} images of train and val, as val has chosen")
    return replace(trained, summary=summary, seconds=trained.seconds + refitted.seconds, frozen=refitted.frozen)


def solved_logits(
    classifier: Classifier,
    samples: tuple[Sample, ...],
    compute: Compute,
    *,
    graph: GraphSource | None = None,
    event: EventCallback = no_event,
    progress: ProgressCallback = silent,
) -> np.ndarray:
    """(N, C) float32 logits of a classifier whose backbone never trained: its head on features that are cached, or will be."""
    resources = Resources(compute.device, compute.threads, graph=graph, progress=progress, event=event)
    features = pooled_features(classifier, samples, Views(classifier.backbone.preprocess), resources)
    with torch.no_grad():
        logits: np.ndarray = classifier.head(torch.from_numpy(features)).numpy()
    return logits


@dataclass
class _HeadSolver:
    """Puts the solved head into a classifier, and remembers how it was found."""

    recipe: Recipe
    dataset: Dataset
    augment: Augment
    run: RunDir
    compute: Compute
    graph: GraphSource | None
    progress: ProgressCallback
    probe: Probe | None = None

    def __call__(self, classifier: Classifier) -> None:
        train, val = self.dataset.of("train"), self.dataset.of("val")
        seen = Views(classifier.backbone.preprocess)
        n_views = (
            1 if self.recipe.n_steps else self.recipe.views
        )  # the steps bring the augmentation; the head before them needs none
        views = replace(seen, augment=self.augment, count=n_views) if n_views > 1 else seen
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
        def progress(update: Any) -> None:
            self.progress(replace(update, message=f"features, {what}"))

        resources = Resources(
            self.compute.device, self.compute.threads, graph=self.graph, progress=progress, event=self.run.event
        )
        return pooled_features(classifier, samples, views, resources)

    def _record(self, probe: Probe) -> None:
        values = {"probe/l2": probe.l2, "probe/seconds": probe.seconds, "probe/iterations": float(probe.iterations)}
        if not self.recipe.n_steps:  # before steps the training loop evaluates the head itself
            for point in probe.path:
                if point.l2 == probe.l2:
                    values |= {"val/loss": point.val_nll, "val/top1": point.val_top1}
        self.run.metric(0, values, epoch=0.0)
        path = [{"l2": point.l2, "val_nll": point.val_nll, "val_top1": point.val_top1} for point in probe.path]
        message = f"the head is solved: L2 {probe.l2:g} ({probe.chosen_by}), {probe.iterations} passes, {probe.seconds:.1f} s"
        self.run.event("head_solved", message, path=path, converged=probe.converged)


def _take_steps(
    classifier: Classifier,
    recipe: Recipe,
    dataset: Dataset,
    augment: Augment,
    run: RunDir,
    compute: Compute,
    identity: Mapping[str, str],
    decided: Fitted | None,
    solver: _HeadSolver,
    progress: ProgressCallback,
) -> Fitted:
    """Run the training loop: on cached activations where a frozen prefix stands before what trains, else on images."""

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

    source = _cached_source(classifier, recipe, dataset, augment, run, compute, progress)
    if source is None:
        source = _image_source(classifier, recipe, dataset, augment, compute)
    return fit(
        classifier,
        recipe,
        source.train,
        source.val if decided is None else decided.decided,
        run,
        Saving(identity),
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


def _image_source(classifier: Classifier, recipe: Recipe, dataset: Dataset, augment: Augment, compute: Compute) -> _Source:
    train, val = dataset.of("train"), dataset.of("val")
    train_augment = augment.at_size(recipe.train_size_px)
    pixels = PixelStore(workspace() / "cache" / "pixels")

    def batches(epoch: int, start_step: int) -> Iterable[Batch]:
        return TrainLoader(train, train_augment, recipe.batch_size, recipe.seed, epoch, start_step, compute.threads, pixels)

    evaluated = EvalLoader(val, classifier.backbone.preprocess, recipe.batch_size, compute.threads, pixels)
    return _Source(batches, evaluated, prepare_images, forward_images)


def _cached_source(
    classifier: Classifier,
    recipe: Recipe,
    dataset: Dataset,
    augment: Augment,
    run: RunDir,
    compute: Compute,
    progress: ProgressCallback,
) -> _Source | None:
    """Batches of what enters the first stage that trains; None where that is the image, or it does not fit the disk."""
    if recipe.mixup or classifier.aux is not None:  # both need the images themselves
        return None
    train, val = dataset.of("train"), dataset.of("val")
    resources = Resources(compute.device, compute.threads, progress=progress, event=run.event)
    seen = Views(classifier.backbone.preprocess)
    views = replace(seen, augment=augment, count=recipe.views)
    plan = plan_prefix(classifier, min(recipe.trainable), train, val, views, resources, measure=False)
    run.event("prefix", str(plan))
    if plan.stage is None:
        return None
    trained_on = cached_activations(classifier, plan.stage, train, replace(views, count=plan.views), resources)
    judged_on = cached_activations(classifier, plan.stage, val, seen, resources)  # a refit has none
    if trained_on is None or judged_on is None:
        return None
    batches, evaluated = trained_on.train_batches(recipe.batch_size, recipe.seed), judged_on.eval_batches(recipe.batch_size)
    return _Source(batches, evaluated, prepare_activation, ForwardFrom(plan.stage))


def _labels(samples: tuple[Sample, ...]) -> np.ndarray:
    return np.array([sample.label for sample in samples], dtype=np.int64)


def _summary(recipe: Recipe, probe: Probe | None, fitted: Fitted | None) -> str:
    if fitted is not None:
        stopped = ", stopped early" if fitted.stopped_early else ""
        return f"{recipe.method}: {fitted.n_steps} steps{stopped}; keeps {fitted.chosen}"
    assert probe is not None
    return f"{recipe.method}: the head is solved on frozen features, L2 {probe.l2:g} ({probe.chosen_by})"
