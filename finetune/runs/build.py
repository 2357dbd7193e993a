"""Build what a resolved run computes with: the network, its exported graph, the augmentation. Nothing of it is written down."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from finetune.data.augment import Augment, build_augment
from finetune.data.dataset import Dataset, Sample
from finetune.executors.places import Places
from finetune.export import DeployModule, Graph, dry_run_export
from finetune.export.graph import fill
from finetune.model.backbone import Backbone, build_backbone
from finetune.model.classifier import Classifier
from finetune.model.threads import on_threads
from finetune.runs.facts import BackboneFacts, StageFacts
from finetune.runs.resolve import Resolved
from finetune.spec import JobSpec
from finetune.storage.store import Store
from finetune.storage.workspace import Workspace
from finetune.tasks import Task, task_named


@dataclass(frozen=True)
class Network:
    """A classifier as it was built, before anything was trained, and its export, tried."""

    classifier: Classifier
    graph: Graph
    facts: BackboneFacts

    def filled(self) -> bytes:
        """Return the classifier as it is now as one ONNX file."""
        return fill(self.graph, DeployModule(self.classifier))

    def copy(self) -> Network:
        """Return a network of its own with the same weights."""
        return replace(self, classifier=copy.deepcopy(self.classifier))


@dataclass(frozen=True)
class Built:
    """A resolved run with everything live that it needs."""

    resolved: Resolved
    dataset: Dataset
    checked_on: tuple[Sample, ...]  # what the export is compared on: the val images, also where they are trained on
    task: Task
    classifier: Classifier
    graph: Graph
    augment: Augment

    def exported(self) -> bytes:
        """Return the classifier, with the weights that it has now, as one ONNX file."""
        return fill(self.graph, DeployModule(self.classifier, task=self.task.name))


@dataclass
class Shared:
    """What the runs of one process share, because it depends on none of them: checked data and untrained networks."""

    workspace: Workspace
    store: Store
    datasets: dict[str, Dataset] = field(default_factory=dict)
    networks: dict[str, Network] = field(default_factory=dict)
    places: Places | None = None  # where a study's runs go on side by side; None: one after another, in this process

    @classmethod
    def of(cls, workspace: Workspace, places: Places | None = None) -> Shared:
        return cls(workspace, Store(workspace.cache), places=places)


def build_classifier(spec: JobSpec, n_classes: int) -> Classifier:
    """Build the backbone that `spec` asks for, with a new head.

    Raises:
        InvalidInput: the backbone, its weights or the head cannot be had as asked.
    """
    with on_threads(1):
        backbone = seeded_backbone(spec)
        torch.manual_seed(spec.seed)  # the new head's first values
        return Classifier(backbone, n_classes, spec.model.head.pooling, aux=spec.model.head.aux)


def trace_network(classifier: Classifier, task: str, workspace: Workspace) -> Network:
    """Try the export of a classifier, before anything is trained.

    Raises:
        ExportError: the backbone could be trained, but not served.
    """
    with on_threads(1):
        return Network(classifier, dry_run_export(classifier, task, workspace.networks), facts_of(classifier))


def seeded_backbone(spec: JobSpec) -> Backbone:
    """Build the backbone that `spec` asks for."""
    torch.manual_seed(spec.seed)  # the first values of a backbone without pretrained weights
    return build_backbone(spec.model.backbone, weights=spec.model.weights, input_size_px=spec.model.input_size_px)


def facts_of(classifier: Classifier) -> BackboneFacts:
    """Describe a classifier's backbone."""
    backbone = classifier.backbone
    weights: Mapping[str, object] = backbone.weights.to_dict()
    return BackboneFacts(
        name=backbone.name,
        stages=tuple(StageFacts(stage.index, stage.name, stage.n_parameters, stage.output_shape) for stage in backbone.stages),
        n_parameters=backbone.n_parameters,
        n_features=backbone.num_features,
        has_batch_norm=any(isinstance(getattr(module, "running_var", None), torch.Tensor) for module in backbone.modules()),
        resizable=backbone.resizable,
        weights=weights,
        preprocess=backbone.preprocess,
        cam_kind=classifier.cam_kind,
        cam_reason=classifier.cam_reason,
    )


def build(resolved: Resolved, dataset: Dataset, network: Network, checked_on: tuple[Sample, ...]) -> Built:
    """Put together what the run computes with; `network` becomes the run's own."""
    classifier = network.classifier
    classifier.backbone.preprocess = resolved.preprocess
    classifier.dropout.p = resolved.recipe.dropout
    augmentation = resolved.spec.augmentation
    return Built(
        resolved=resolved,
        dataset=dataset,
        checked_on=checked_on,
        task=task_named(resolved.task),
        classifier=classifier,
        graph=network.graph,
        augment=build_augment(augmentation.policy, augmentation.transforms, resolved.preprocess),
    )
