"""Build the network of a request in torch, trace it for ONNX, and record it so that later runs need no torch."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.bundle.preprocess import Preprocess
from finetune.bundle.registry import Registry
from finetune.bundle.weights import HEAD_BIAS, HEAD_WEIGHT, find_origin
from finetune.data.dataset import Sample
from finetune.errors import FinetuneError, UnknownBackbone, WeightsError
from finetune.export.agreement import Reference
from finetune.export.dry_run import dry_run_export
from finetune.export.graph import EXPORTER, DeployModule, Graph, fold, head_of
from finetune.export.reference import head_reference, torch_outputs
from finetune.export.template import Head, with_head
from finetune.features.engine import onnx_engine_name
from finetune.features.prefix import ClassifierPrefix, embedding_prefix
from finetune.features.rows import engine_folder
from finetune.model.backbone import Backbone, build_backbone
from finetune.model.classifier import Classifier
from finetune.model.facts import BackboneFacts, StageFacts
from finetune.model.freeze import frozen_digest
from finetune.model.tensors import Tensors, read_tensors
from finetune.model.threads import on_threads
from finetune.runs.known import Record, file_state, network_key, record_network
from finetune.runs.shared import Shared
from finetune.spec import JobSpec, is_own_model

_NOTHING_TRAINS: frozenset[int] = frozenset()


class BuiltNetwork:
    """A `Network` that is a torch classifier before training. Its weights never change: a run trains a copy."""

    exporter = EXPORTER

    def __init__(self, classifier: Classifier, spec: JobSpec, task: str, shared: Shared) -> None:
        self.classifier = classifier
        self.facts = facts_of(classifier)
        self.task = task
        self._spec, self._shared = spec, shared
        self._tracing = threading.Lock()
        self._traced: Future[Graph] = Future()
        self._begun: tuple[tuple[Sample, ...], Preprocess, Future[NDArray[np.float32]]] | None = None

    def traced(self) -> Graph:
        """Return the traced network, after a trial export. The first caller traces it; callers in other threads wait for it.

        Raises:
            ExportError: the backbone cannot be exported, although it could be trained.
        """
        with self._tracing:
            if not self._traced.done():
                try:
                    with on_threads(1):
                        self._traced.set_result(dry_run_export(self.classifier, self.task, self._shared.workspace.networks))
                except FinetuneError as error:
                    self._traced.set_exception(error)
        return self._traced.result()

    @cached_property
    def template(self) -> bytes:
        """The network as an ONNX file in which head and temperature can be replaced (`finetune.export.template`)."""
        return fold(self.traced(), DeployModule(self.classifier, task=self.task))

    @cached_property
    def prefix(self) -> ClassifierPrefix:
        return embedding_prefix(self.classifier, self.untrained)

    @property
    def seed(self) -> int:
        origin = self.classifier.backbone.weights.origin
        return self._spec.seed if origin is None else origin.seed

    def try_export(self) -> None:
        self.traced()

    def untrained(self) -> bytes:
        """Return the network with its initial head as one ONNX file."""
        return self.with_head(head_of(self.classifier), 1.0)

    def frozen_digest(self) -> str:
        return frozen_digest(self.classifier, _NOTHING_TRAINS)

    def with_head(self, head: Head, temperature: float) -> bytes:
        return with_head(self.template, head, temperature)

    def begin_reference(self, samples: Sequence[Sample], preprocess: Preprocess) -> None:
        """Compute the embeddings of samples in torch in another thread, on one core, while the head is solved."""

        def compute() -> NDArray[np.float32]:
            images = np.stack([sample.decode(preprocess.load) for sample in samples])
            with on_threads(1):
                return self._embeddings(images)

        pool = ThreadPoolExecutor(1, "reference")
        self._begun = (tuple(samples), preprocess, pool.submit(compute))
        pool.shutdown(wait=False)

    def reference(
        self, head: Head, temperature: float, samples: Sequence[Sample], images: NDArray[np.uint8], preprocess: Preprocess
    ) -> Reference:
        """Compute the outputs in torch. If the export agrees, the network is recorded, so that later runs need no torch."""
        begun = self._begun_for(samples, preprocess)
        embeddings = self._embeddings(images) if begun is None else begun
        found = head_reference(embeddings, head, temperature, self.task)
        return replace(found, when_agreed=partial(self._record, embeddings, samples, preprocess))

    def _begun_for(self, samples: Sequence[Sample], preprocess: Preprocess) -> NDArray[np.float32] | None:
        """Return the embeddings that `begin_reference` computes; None if it was not called for these samples."""
        if self._begun is None or self._begun[:2] != (tuple(samples), preprocess):
            return None
        return self._begun[2].result()

    def _embeddings(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return torch's embeddings (N, D) of images (N, h, w, 3) uint8."""
        return torch_outputs(DeployModule(self.classifier, task=self.task), images).embedding

    def fresh_classifier(self, seed: int) -> Classifier:
        """Return an independent copy to train, whose head is initialised from `seed`."""
        backbone, head = copy.deepcopy(self.classifier.backbone), self._spec.model.head
        torch.manual_seed(seed)
        return Classifier(backbone, self.classifier.num_classes, head.pooling, aux=head.aux)

    def tensors(self) -> Tensors:
        return carried_tensors(self.classifier.backbone, trained=False)

    def own_head(self, classes: Sequence[str]) -> Head | None:
        """Return the head of the user's model that this network starts from, its rows in the order of `classes`.

        Returns:
            None if the network does not start from such a model, or if its task, classes, pooling or embedding size differ.
        """
        origin = self.classifier.backbone.weights.origin
        if origin is None or origin.manifest.task != self.task or sorted(origin.manifest.classes) != sorted(classes):
            return None
        tensors = read_tensors(origin)
        order = [origin.manifest.classes.index(name) for name in classes]
        head = Head(np.asarray(tensors[HEAD_WEIGHT], np.float32)[order], np.asarray(tensors[HEAD_BIAS], np.float32)[order])
        fits = self.classifier.pooling == origin.pooling and head.weight.shape[1] == self.classifier.head.in_features
        return head if fits else None

    def _record(self, embedding: NDArray[np.float32], samples: Sequence[Sample], preprocess: Preprocess) -> None:
        """Record the network for later runs, with torch's embeddings (N, D) of N samples, unless ONNX Runtime cannot run it."""
        folder = engine_folder(self.prefix, preprocess, self._shared.store)
        if self.prefix.expected_engine("cpu", folder) != onnx_engine_name():
            return
        weights_file = self.classifier.backbone.weights.file
        record = Record(
            task=self.task,
            facts=self.facts,
            embedding_digest=self.prefix.digest,
            frozen_digest=self.frozen_digest(),
            exporter=self.exporter,
            torch=torch.__version__,
            n_compared=len(samples),
            weights_file=file_state(str(weights_file.absolute())) if weights_file else None,
            seed=self.seed,
        )
        shared = self._shared
        key = network_key(self._spec, self.task, shared.workspace.models)
        record_network(key, record, self.template, self.prefix, embedding, samples, preprocess, shared.recorded, shared.store)


def carried_tensors(backbone: Backbone, *, trained: bool) -> Tensors:
    """Return the backbone's tensors that a bundle must contain: none if they still are the pretrained weights, else all.

    Args:
        trained: whether this run has trained some of them.
    """
    if not trained and backbone.weights.source != "model":
        return {}
    return {name: tensor.detach().cpu().numpy() for name, tensor in backbone.module.state_dict().items()}


def build_network(spec: JobSpec, task: str, n_classes: int, shared: Shared) -> BuiltNetwork:
    """Build the backbone that `spec` requests, with a newly initialised head.

    Raises:
        InvalidInput: the backbone, its weights or the head does not exist under the name in the request.
    """
    with on_threads(1):
        backbone = seeded_backbone(spec, shared)
        torch.manual_seed(spec.seed)  # initialises the new head
        classifier = Classifier(backbone, n_classes, spec.model.head.pooling, aux=spec.model.head.aux)
    _check_random_start(classifier)
    return BuiltNetwork(classifier, spec, task, shared)


def _check_random_start(classifier: Classifier) -> None:
    """Check that a randomly initialised backbone has the same values as when the user's model was trained on it.

    Raises:
        WeightsError: it has others, because this version of torch or timm initialises it differently from the same seed.
    """
    weights = classifier.backbone.weights
    if weights.origin is None or weights.source != "none":
        return
    if weights.origin.manifest.frozen.get("digest_before") != frozen_digest(classifier, _NOTHING_TRAINS):
        raise WeightsError(
            f"{weights.origin.reference} has a randomly initialised backbone from another version of torch or timm, which "
            "cannot be reproduced here: train it with method partial or full, whose bundle keeps the weights"
        )


def seeded_backbone(spec: JobSpec, shared: Shared) -> Backbone:
    """Build the backbone that `spec` requests, from timm or from one of the user's own models.

    Raises:
        InvalidInput: the backbone or its weights do not exist under the name in the request.
        NotFound: the request names a model of the user that does not exist.
    """
    asked = spec.model
    if not is_own_model(asked.backbone):
        torch.manual_seed(spec.seed)  # initialises a backbone without pretrained weights
        try:
            return build_backbone(asked.backbone, weights=asked.weights, input_size_px=asked.input_size_px)
        except UnknownBackbone:
            own = Registry(shared.workspace.models).versions(asked.backbone)
            if not own:
                raise
            raise UnknownBackbone(
                f"model.backbone: {asked.backbone} is a model of your own; to train on from it, say which version: "
                f"{asked.backbone}@{own[-1].version} is the newest"
            ) from None
    origin = find_origin(asked.backbone, shared.workspace.models)
    torch.manual_seed(origin.seed)
    return build_backbone(origin.architecture, input_size_px=asked.input_size_px, origin=origin)


def facts_of(classifier: Classifier) -> BackboneFacts:
    """Return the torch-free description of a classifier's backbone."""
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
