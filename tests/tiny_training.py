"""A real training run, small enough to repeat: generated pictures on disk, a timm test architecture, the real loaders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folders import local_sample
from PIL import Image

from finetune.data.augment import build_augment
from finetune.data.dataset import Sample
from finetune.data.loader import EvalLoader, TrainLoader
from finetune.model.backbone import build_backbone
from finetune.model.classifier import Classifier
from finetune.progress import ProgressCallback, silent
from finetune.runtime.seconds import Seconds
from finetune.spec import parse_spec
from finetune.storage.rundir import RunDir
from finetune.tasks import task_named
from finetune.training.choices import Choices
from finetune.training.final_weights import TrainBatches
from finetune.training.fit import fit
from finetune.training.machine import Numerics
from finetune.training.objectives import objective_of
from finetune.training.recipe import Facts, Recipe, resolve_recipe
from finetune.training.sample import SamplePlan, TrainSample
from finetune.training.state import CheckpointSchedule, Fitted

CLASSES = 3
WALL_CLOCK = ("train/images_per_second",)
MULTICLASS = {"task": task_named("multiclass"), "objective": objective_of("multiclass")}


def write_images(folder: Path, count: int) -> list[Sample]:
    """`count` small pictures, a colour and a stripe direction for each class, with noise."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for number in range(count):
        generator = np.random.default_rng(number)
        label = number % CLASSES
        pixels = generator.integers(0, 120, (72, 80, 3), dtype=np.uint8)
        pixels[:, :: label + 2, label] += 100
        path = folder / f"{number:03d}.png"
        Image.fromarray(pixels).save(path)
        samples.append(local_sample(path, label, "train"))
    return samples


def targets_of(samples: Sequence[Sample]) -> np.ndarray:
    """(N,) int64 class indices, as `fit` takes them."""
    return np.array([sample.target for sample in samples], dtype=np.int64)


def tiny_classifier(architecture: str = "test_efficientnet", dropout: float = 0.2, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(build_backbone(architecture, weights="none", input_size_px=64), CLASSES, dropout=dropout)


def tiny_recipe(classifier: Classifier, n_train: int, **given: Any) -> Recipe:
    spec = parse_spec({"training_file": "unused", **given})
    backbone = classifier.backbone
    size_px = backbone.preprocess.input_size_px
    facts = Facts(n_train=n_train, n_val=6, n_classes=CLASSES, n_parameters=backbone.n_parameters, input_size_px=size_px)
    return resolve_recipe(spec, facts, classifier.backbone.stages)


def epochs_of(samples: list[Sample], classifier: Classifier, recipe: Recipe, threads: int = 1) -> TrainBatches:
    augment = build_augment("default", None, classifier.backbone.preprocess)
    loader = TrainLoader(samples, augment, recipe.batch_size, recipe.seed, threads=threads)
    return lambda epoch, start_step: replace(loader, epoch=epoch, start_step=start_step)


def class_means(classifier: Classifier, samples: list[Sample]) -> None:
    """A head solved in closed form, as good as any to begin with: each class's mean embedding."""
    classifier.eval()
    targets = torch.from_numpy(targets_of(samples))
    with torch.no_grad():
        for batch in EvalLoader(samples, classifier.backbone.preprocess):
            embeddings = classifier.embed(classifier.normalise(torch.from_numpy(batch.images)))
            for label in range(CLASSES):
                classifier.head.weight[label] = embeddings[targets[torch.from_numpy(batch.indices)] == label].mean(0)
        classifier.head.bias.zero_()


def train_tiny(
    run: RunDir,
    samples: list[Sample],
    given: dict[str, Any],
    *,
    loader_threads: int = 1,
    every_steps: int | None = 2,
    progress: ProgressCallback = silent,
    identity: dict[str, str] | None = None,
    wrap: Callable[[TrainBatches], TrainBatches] = lambda train: train,
    decided: Choices | None = None,
    head_seconds: Seconds | None = None,
    sampled: dict[int, int] | None = None,
) -> tuple[Fitted, Classifier]:
    """Train for real, on all `samples` but the last six.

    Args:
        head_seconds: what solving the head is said to take; by default nothing.
        sampled: gets, for each epoch's end, how many images of a sample of training images were answered; None: no sample.
    """

    def solve_head(fresh: Classifier) -> Seconds:
        class_means(fresh, train)
        return head_seconds or Seconds()

    train, val = samples[:-6], samples[-6:]
    classifier = tiny_classifier()
    recipe = tiny_recipe(classifier, len(train), **given)
    sample = None
    if sampled is not None:
        batches = EvalLoader(train[:5], classifier.backbone.preprocess, threads=loader_threads)
        plan = SamplePlan(np.arange(5), frozenset(range(0, recipe.n_steps + 1, recipe.steps_per_epoch)))
        sample = TrainSample(plan, batches, lambda step, logits: sampled.update({step: len(logits)}))
    fitted = fit(
        classifier,
        recipe,
        wrap(epochs_of(train, classifier, recipe, loader_threads)),
        decided or EvalLoader(val, classifier.backbone.preprocess, threads=loader_threads),
        run.create(),
        CheckpointSchedule(identity or {"spec": "a", "dataset": "b"}, every_steps=every_steps),
        **MULTICLASS,
        train_targets=targets_of(train),
        val_targets=targets_of(val),
        numerics=lambda: Numerics(threads=1),
        solve_head=solve_head,
        sample=sample,
        progress=progress,
    )
    return fitted, classifier


def fingerprint(fitted: Fitted, classifier: Classifier) -> dict[str, Any]:
    """What two equal runs have in common to the last bit: weights, metrics, and the journal without wall-clock times."""
    digest = hashlib.sha256()
    for name, tensor in classifier.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    history = [
        [line["step"], {key: value for key, value in line["values"].items() if key not in WALL_CLOCK}] for line in fitted.history
    ]
    return {"weights": digest.hexdigest(), "chosen": fitted.chosen, "best": dict(fitted.best), "history": json.dumps(history)}
