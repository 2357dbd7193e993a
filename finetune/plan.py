"""The plan: a request with everything that can be known before training. `finetune check` shows it, `run_job` carries it out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from finetune.data.augment import Augment, build_augment
from finetune.data.check import ResizeAdvice, advise_resize, check_images, image_facts
from finetune.data.dataset import Dataset
from finetune.data.index import index_dataset
from finetune.data.split import fold_datasets, read_split, split_dataset, write_split
from finetune.errors import InvalidInput, Problem
from finetune.export import DeployModule, Graph, dry_run_export
from finetune.export.graph import fill
from finetune.model.backbone import Backbone, build_backbone
from finetune.model.classifier import Classifier
from finetune.naming import as_model_name
from finetune.progress import Progress, ProgressCallback, silent
from finetune.runtime.cores import available_cores
from finetune.spec import JobSpec
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store
from finetune.storage.workspace import Workspace
from finetune.train.machine import on_threads, resolve_device
from finetune.train.methods import Compute
from finetune.train.recipe import Facts, Recipe, candidates, resolve_recipe


@dataclass(frozen=True)
class Plan:
    """A request with everything that can be known before training: data checked and split, network built, recipe resolved."""

    spec: JobSpec
    dataset: Dataset
    advice: ResizeAdvice
    backbone: Backbone
    classifier: Classifier
    graph: Graph  # the classifier's export, tried; its weights are put in when it is asked for
    augment: Augment
    recipes: tuple[Recipe, ...]  # what is tried, from the cheapest up; more than one only for method auto
    compute: Compute
    folds: tuple[Dataset, ...] = ()  # for cross-validation: what each fold trains, chooses and is tested on

    def exported(self) -> bytes:
        """The classifier as it is now, as one ONNX file."""
        return fill(self.graph, DeployModule(self.classifier))

    @property
    def augments(self) -> bool:
        """Whether anything is trained on augmented views; a head that is solved on the images as evaluated is not."""
        return any(recipe.n_steps or recipe.views > 1 for recipe in self.recipes)

    @property
    def rounds(self) -> int:
        """How often the recipe is carried out: in the job itself and in each fold, and in each of these again for a refit."""
        return (1 + len(self.folds)) * (2 if self.spec.refits else 1)

    @property
    def recipe(self) -> Recipe:
        """The recipe, and for method auto the deepest."""
        return self.recipes[-1]

    @property
    def model_name(self) -> str:
        return self.spec.suffix or as_model_name(self.dataset.name)

    def to_dict(self) -> dict[str, Any]:
        """The resolved values and where each came from, as ``resolved.json`` holds them."""
        trainable = set(self.recipe.trainable)
        return {
            "spec": self.spec.model_dump(mode="json"),
            "spec_digest": self.spec.digest(),
            "model_name": self.model_name,
            "dataset": {
                "root": self.dataset.root,
                "digest": self.dataset.digest,
                "classes": list(self.dataset.classes),
                "counts": self.dataset.counts(),
                "quarantined": [{"file": bad.where, "reason": bad.reason} for bad in self.dataset.bad],
                "warnings": list(self.dataset.warnings),
            },
            "preprocess": self.backbone.preprocess.to_dict(),
            "backbone": {
                "name": self.backbone.name,
                "weights": self.backbone.weights.to_dict(),
                "n_parameters": self.backbone.n_parameters,
                "stages": [
                    {"name": stage.name, "n_parameters": stage.n_parameters, "trains": stage.index in trainable}
                    for stage in self.backbone.stages
                ],
                "class_activation_map": self.classifier.cam_kind,
            },
            "augmentation": self.augment.to_dict() if self.augments else None,
            "recipe": self.recipe.to_dict(),
            "folds": [dataset.counts() for dataset in self.folds],
            "candidates": [recipe.method for recipe in self.recipes],
            "compute": asdict(self.compute),
            "sources": {**self.recipe.sources, "data.resize": self.advice.reason},
        }


def make_plan(spec: JobSpec, workspace: Workspace, progress: ProgressCallback = silent, run: RunDir | None = None) -> Plan:
    """Everything before training. With `run`, the split of a run that was interrupted is read back instead of drawn again.

    The files are read in a thread of their own, while the network is built and its export tried.

    Raises:
        InvalidInput: what is wrong with the folders and what with the model, in one error; else what is wrong with the files.
        ExportError: the backbone could be trained, but not served.
    """
    compute = Compute(resolve_device(spec.compute.device), spec.compute.precision, _threads(spec))
    indexed = _index_for(spec)
    with _reading(spec, indexed, workspace, progress, run) as reading:
        with on_threads(1):
            classifier, graph = _build_network(spec, len(indexed.classes), workspace)
        dataset = reading.result()
    backbone = classifier.backbone
    folds: tuple[Dataset, ...] = ()
    if spec.data.folds is not None:
        folds = fold_datasets(dataset, spec.data.folds, val_fraction=spec.data.val_fraction, seed=spec.seed)
    advice = _advice(spec, dataset, backbone)
    backbone.preprocess = replace(backbone.preprocess, resize=advice.resize)
    augment = build_augment(spec.augmentation.policy, spec.augmentation.transforms, backbone.preprocess)
    recipes = _recipes(spec, dataset, backbone, compute)
    classifier.dropout.p = recipes[-1].dropout
    return Plan(spec, dataset, advice, backbone, classifier, graph, augment, recipes, compute, folds)


def replan(plan: Plan, dataset: Dataset) -> Plan:
    """The same plan for other images, with a network of its own that is as the plan's is now."""
    classifier = copy.deepcopy(plan.classifier)
    recipes = _recipes(plan.spec, dataset, classifier.backbone, plan.compute)
    return replace(plan, dataset=dataset, backbone=classifier.backbone, classifier=classifier, recipes=recipes, folds=())


def _recipes(spec: JobSpec, dataset: Dataset, backbone: Backbone, compute: Compute) -> tuple[Recipe, ...]:
    facts = facts_of(dataset, backbone, compute)
    return tuple(resolve_recipe(candidate, facts, backbone.stages) for candidate in candidates(spec, backbone.stages))


def _index_for(spec: JobSpec) -> Dataset:
    """The files by class; where that fails, the error also tells what is wrong with the model."""
    try:
        return index_dataset(Path(spec.training_file), _path(spec.validation_file), _path(spec.test_file))
    except InvalidInput as of_data:
        try:
            _build_backbone(spec)
        except InvalidInput as of_model:
            problems = [found for error in (of_data, of_model) for found in (Problem("", error.message), *error.problems)]
            raise InvalidInput("two things are wrong with this request", problems) from of_data
        raise


@contextmanager
def _reading(
    spec: JobSpec, indexed: Dataset, workspace: Workspace, progress: ProgressCallback, run: RunDir | None
) -> Iterator[Future[Dataset]]:
    """`read_dataset` in a thread of its own; where the block ends by an exception, it is given up soon."""
    given_up = Event()

    def report(update: Progress) -> None:
        if given_up.is_set():
            raise CancelledError
        progress(update)

    with ThreadPoolExecutor(1, "reading") as pool:
        try:
            yield pool.submit(read_dataset, spec, indexed, workspace, report, run)
        except BaseException:
            given_up.set()
            raise


def read_dataset(
    spec: JobSpec, indexed: Dataset, workspace: Workspace, progress: ProgressCallback, run: RunDir | None
) -> Dataset:
    """Checked and split; the split of an interrupted run is kept."""
    data = spec.data
    memory = Store(workspace.cache).folder("notes")
    checked = check_images(
        indexed, on_bad=data.on_bad_image, max_bad_fraction=data.max_bad_fraction, progress=progress, memory=memory
    )
    if run is not None and run.split.exists():
        return read_split(run.split, checked)
    dataset = split_dataset(checked, val_fraction=data.val_fraction, test_fraction=data.held_out_fraction, seed=spec.seed)
    if run is not None:
        write_split(run.split, dataset)
    return dataset


def facts_of(dataset: Dataset, backbone: Backbone, compute: Compute) -> Facts:
    """What ``auto`` may depend on."""
    return Facts(
        n_train=len(dataset.of("train")),
        n_val=len(dataset.of("val")),
        n_classes=len(dataset.classes),
        n_parameters=backbone.n_parameters,
        device=compute.device,
        threads=compute.threads,
        has_batch_norm=any(isinstance(getattr(module, "running_var", None), torch.Tensor) for module in backbone.modules()),
        pretrained=backbone.weights.source != "none",
        input_size_px=backbone.preprocess.input_size_px,
        resizable=backbone.resizable,
    )


def _build_backbone(spec: JobSpec) -> Backbone:
    torch.manual_seed(spec.seed)  # the first values of a backbone without pretrained weights
    return build_backbone(spec.model.backbone, weights=spec.model.weights, input_size_px=spec.model.input_size_px)


def _build_network(spec: JobSpec, n_classes: int, workspace: Workspace) -> tuple[Classifier, Graph]:
    backbone = _build_backbone(spec)
    torch.manual_seed(spec.seed)  # the new head's first values
    classifier = Classifier(backbone, n_classes, spec.model.head.pooling, aux=spec.model.head.aux)
    return classifier, dry_run_export(classifier, workspace.networks)


def _advice(spec: JobSpec, dataset: Dataset, backbone: Backbone) -> ResizeAdvice:
    """How images are framed: as given; else as the weights were trained, unless that would hide much of these images."""
    if spec.data.resize != "auto":
        return ResizeAdvice(spec.data.resize, "given")
    advice = advise_resize(image_facts(dataset.samples))
    if advice.resize == "crop":
        return ResizeAdvice(backbone.preprocess.resize, f"as the weights were trained; {advice.reason}")
    return advice


def _threads(spec: JobSpec) -> int:
    return available_cores() if spec.compute.threads == "auto" else spec.compute.threads


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
