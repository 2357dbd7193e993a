"""Resolve a request: decide every ``auto`` once, from facts, and record the reason. Pure functions; torch-free.

The result is a serialisable value. Networks, loaders and sessions are built from it (`finetune.runs.build`) and are not part of
it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from finetune.bundle.preprocess import Preprocess
from finetune.data.check import ResizeAdvice, advise_resize, image_facts
from finetune.data.dataset import Dataset, targets_of, unmeasured
from finetune.doctor.classes import class_warnings
from finetune.messages import printable
from finetune.model.facts import BackboneFacts
from finetune.naming import model_name
from finetune.runtime.device import Device
from finetune.spec import JobSpec, parse_spec
from finetune.tasks import Task, task_named, task_of
from finetune.training.compute import Compute
from finetune.training.image_weights import WeightFacts, weight_facts
from finetune.training.recipe import GIVEN, Facts, Recipe, refit_recipe, resolve_recipe

_WEIGHTS_FROM = {"package": "an installed package", "hub": "timm's hub", "model": "the bundle of your own model"}


@dataclass(frozen=True)
class DatasetFacts:
    """A description of the data of a run, after reading and splitting."""

    name: str
    root: str
    digest: str
    classes: tuple[str, ...]
    counts: Mapping[str, Mapping[str, int]]  # images by split and class
    sizes: Mapping[str, int]  # images by split
    quarantined: tuple[Mapping[str, str], ...]  # file and reason
    warnings: tuple[str, ...]
    understood: tuple[str, ...] = ()  # sentences: how the data was interpreted, if several interpretations were possible
    revision: str = ""  # digest of the data before the split
    weights: Mapping[str, float] | None = None  # figures of the training images' weights, if the data gives them different ones

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> DatasetFacts:
        """Return the facts from JSON values, in which tuples are lists."""
        values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        return cls(**values)

    @classmethod
    def of(cls, dataset: Dataset) -> DatasetFacts:
        """Return the facts of a dataset that has been split."""
        counts = dataset.counts()
        missing = {split: [name for name, n in counts[split].items() if not n] for split in ("val", "test") if split in counts}
        noun = task_of(targets_of(dataset.samples)).noun
        unmeasurable = (unmeasured(split, names, noun) for split, names in missing.items() if names)
        weights = weight_facts(dataset.of("train"), dataset.classes)
        warnings = [*dataset.warnings, *unmeasurable, *class_warnings(dataset)]
        return cls(
            name=dataset.name,
            root=dataset.root,
            digest=dataset.digest,
            classes=dataset.classes,
            counts=counts,
            sizes=dataset.sizes(),
            quarantined=tuple({"file": bad.where, "reason": bad.reason} for bad in dataset.bad),
            warnings=tuple(dict.fromkeys(warnings)),
            understood=dataset.understood,
            revision=dataset.revision,
            weights=None if weights is None else asdict(weights),
        )


@dataclass(frozen=True)
class Resolved:
    """A request in which every ``auto`` is decided: ``resolved.json``. The run carries out and reports exactly these values."""

    spec: JobSpec
    model_name: str
    task: str
    dataset: DatasetFacts
    backbone: BackboneFacts
    preprocess: Preprocess
    augmentation: str | None  # name of the policy; None if nothing is trained on augmented views
    recipe: Recipe
    compute: Compute
    sources: Mapping[str, str]  # field path of the spec -> where its value came from

    @property
    def augments(self) -> bool:
        """Whether anything is trained on augmented views; False for a head that is solved on the unaugmented images."""
        return self.augmentation is not None

    @property
    def weights_text(self) -> str:
        """The column of image weights and a summary of them, as text; empty if all training images have the same weight."""
        weights = self.dataset.weights
        return f"{self.spec.data.weight_column}: {WeightFacts(**weights)}" if weights else ""

    def values(self) -> dict[str, Any]:
        """Return, by field path, the resolved value of every spec field that may be ``auto`` and that this run uses."""
        recipe = self.recipe
        return {
            "task": self.task,
            "model.backbone": self.backbone.name,
            "model.weights": self.backbone.weights["identifier"],
            **({"model.origin": origin["model"]} if (origin := self.backbone.weights.get("origin")) else {}),
            "model.input_size_px": self.preprocess.input_size_px[0],
            "model.head.dropout": recipe.dropout,
            "data.resize": self.preprocess.resize,
            **({"data.weight_column": self.weights_text} if self.weights_text else {}),
            **(self._values_of_steps() if recipe.n_steps else {}),
            "hyperparameters.label_smoothing": recipe.label_smoothing,
            "hyperparameters.views": recipe.views,
            "hyperparameters.l2": "chosen by validation" if recipe.l2 is None else recipe.l2,
            "augmentation.policy": self.augmentation or "none",
            "compute.device": self.compute.device,
            "compute.threads": self.compute.threads,
        }

    def _values_of_steps(self) -> dict[str, Any]:
        """Return the resolved values that only apply if the recipe takes optimiser steps."""
        recipe = self.recipe
        return {
            "hyperparameters.n_epochs": recipe.n_epochs,
            "hyperparameters.batch_size": recipe.batch_size,
            "hyperparameters.train_size_px": recipe.train_size_px[0],
            "hyperparameters.learning_rate": recipe.peak_learning_rate,
            "hyperparameters.weight_decay": recipe.weight_decay,
            **({"hyperparameters.loss": recipe.loss} if len(task_named(self.task).losses) > 1 else {}),
            "hyperparameters.ema": recipe.ema_half_life_steps is not None,
            "hyperparameters.early_stopping_epochs": recipe.early_stopping_epochs,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``resolved.json``."""
        trainable = set(self.recipe.trainable)
        backbone = self.backbone.to_dict()
        backbone["stages"] = [{**stage, "trains": stage["index"] in trainable} for stage in backbone["stages"]]
        return {
            "schema_version": 2,
            "spec": self.spec.model_dump(mode="json"),
            "spec_digest": self.spec.digest(),
            "model_name": self.model_name,
            "task": self.task,
            "dataset": asdict(self.dataset),
            "backbone": backbone,
            "preprocess": self.preprocess.to_dict(),
            "augmentation": self.augmentation,
            "recipe": self.recipe.to_dict(),
            "compute": asdict(self.compute),
            "values": self.values(),
            "sources": dict(self.sources),
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Resolved:
        """Return the inverse of `to_dict`, also for values from JSON, in which tuples are lists."""
        stages = [{key: value for key, value in stage.items() if key != "trains"} for stage in given["backbone"]["stages"]]
        return cls(
            spec=parse_spec(given["spec"]),
            model_name=given["model_name"],
            task=given["task"],
            dataset=DatasetFacts.from_dict(given["dataset"]),
            backbone=BackboneFacts.from_dict({**given["backbone"], "stages": stages}),
            preprocess=Preprocess.from_dict(given["preprocess"]),
            augmentation=given["augmentation"],
            recipe=Recipe.from_dict(given["recipe"]),
            compute=Compute(**given["compute"]),
            sources=given["sources"],
        )


def resolve(
    spec: JobSpec,
    dataset: Dataset,
    backbone: BackboneFacts,
    compute: Compute,
    decided_by: Resolved | None = None,
    l2: float | None = None,
) -> Resolved:
    """Decide every ``auto`` of a request for one method.

    Args:
        dataset: read, checked and split.
        decided_by: the resolved values of an earlier run of the same request, whose recipe is used for a larger training set.
        l2: the L2 penalty that the head of the earlier run was solved with.

    Raises:
        SpecError: the request does not fit the backbone.
    """
    advice = resolve_resize(spec, dataset, backbone.preprocess)
    task = resolve_task(spec, dataset)
    sizes = dataset.sizes()
    facts = Facts(
        n_train=sizes.get("train", 0),
        n_val=sizes.get("val", 0),
        n_classes=len(dataset.classes),
        n_parameters=backbone.n_parameters,
        device=compute.device,
        threads=compute.threads,
        has_batch_norm=backbone.has_batch_norm,
        pretrained=backbone.is_pretrained,
        input_size_px=backbone.preprocess.input_size_px,
        resizable=backbone.resizable,
        losses=task.losses,
        why_unsmoothed=task.why_unsmoothed,
    )
    if decided_by is None:
        recipe = resolve_recipe(spec, facts, backbone.stages)
        preprocess, reason = replace(backbone.preprocess, resize=advice.resize), advice.reason
    else:
        recipe = refit_recipe(decided_by.recipe, facts.n_train, l2)
        preprocess, reason = decided_by.preprocess, decided_by.sources["data.resize"]
    augments = bool(recipe.n_steps) or recipe.views > 1
    policy = "as listed" if spec.augmentation.transforms is not None else spec.augmentation.policy
    return Resolved(
        spec=spec,
        model_name=model_name(spec.suffix, dataset.name),
        task=task.name,
        dataset=DatasetFacts.of(dataset),
        backbone=backbone,
        preprocess=preprocess,
        augmentation=policy if augments else None,
        recipe=recipe,
        compute=compute,
        sources={**recipe.sources, **_reasons(spec, task, backbone, compute), "data.resize": reason},
    )


def _why_threads(threads: int) -> str:
    """Return where an automatic number of threads comes from; ``OMP_NUM_THREADS`` is not it, which is said if it is set."""
    said, asked = "the cores that this process may use", os.environ.get("OMP_NUM_THREADS", "")
    return (
        said if asked in ("", str(threads)) else f"{said}; compute.threads sets it, OMP_NUM_THREADS={printable(asked)} does not"
    )


def _reasons(spec: JobSpec, task: Task, backbone: BackboneFacts, compute: Compute) -> dict[str, str]:
    """Return the reasons for the values that are not part of the recipe, by field path."""
    defaults = {
        "task": (spec.task, task.description),
        "model.weights": (spec.model.weights, f"default: found in {_WEIGHTS_FROM.get(backbone.weights['source'], 'a file')}"),
        "model.input_size_px": (spec.model.input_size_px, "as the weights were trained"),
        "compute.device": (spec.compute.device, "a GPU" if compute.device == "cuda" else "PyTorch sees no GPU here"),
        "compute.threads": (spec.compute.threads, _why_threads(compute.threads)),
    }
    return {path: default if given == "auto" else GIVEN for path, (given, default) in defaults.items()}


def resolve_compute(spec: JobSpec, device: Device, cores: int) -> Compute:
    """Return the resolved compute section of a request.

    Args:
        device: the resolved device.
        cores: the number of threads if the request leaves it at ``auto``.
    """
    return Compute(device, spec.compute.precision, cores if spec.compute.threads == "auto" else spec.compute.threads)


def resolve_task(spec: JobSpec, dataset: Dataset) -> Task:
    """Return the task of a request: the one that it names, else the one that fits the labels."""
    return task_of(targets_of(dataset.samples)) if spec.task == "auto" else task_named(spec.task)


def resolve_resize(spec: JobSpec, dataset: Dataset, preprocess: Preprocess) -> ResizeAdvice:
    """Return the resize mode and the reason: as given, else as the weights were trained, unless that crops away too much."""
    if spec.data.resize != "auto":
        return ResizeAdvice(spec.data.resize, GIVEN)
    advice = advise_resize(image_facts(dataset.samples))
    if advice.resize == "crop":
        return ResizeAdvice(preprocess.resize, f"as the weights were trained; {advice.reason}")
    return advice
