"""A learner that takes optimiser steps in torch, from a solved head or from a random one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.export.agreement import Reference
from finetune.export.graph import EXPORTER, DeployModule, fold, head_of
from finetune.export.pack import ExportedNetwork, KeptWeights
from finetune.export.reference import torch_reference
from finetune.export.template import with_head
from finetune.runs.build import BuiltNetwork, carried_tensors
from finetune.runs.learner import run_model
from finetune.runs.resolve import Resolved
from finetune.training.choices import Choices
from finetune.training.context import Trained, TrainingContext
from finetune.training.train import train


class SteppedLearner:
    """A `Learner` that trains a copy of a built network's classifier."""

    def __init__(self, network: BuiltNetwork, resolved: Resolved) -> None:
        self.network = network
        self.recipe, self.preprocess = resolved.recipe, resolved.preprocess
        self.classifier = network.fresh_classifier(resolved.spec.seed)
        self.classifier.backbone.preprocess = resolved.preprocess
        self.classifier.dropout.p = resolved.recipe.dropout
        if (own := network.own_head(resolved.dataset.classes)) is not None:
            self.classifier = self.classifier.with_head(torch.from_numpy(own.weight), torch.from_numpy(own.bias))

    def begin_reference(self, samples: Sequence[Sample]) -> None:
        """Do nothing, because every layer may change until training ends."""

    def train(self, context: TrainingContext, decided: Choices | None) -> Trained:
        return train(self.classifier, self.recipe, context, decided, self.network.untrained)

    def predict(
        self, samples: tuple[Sample, ...], context: TrainingContext, split: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        model = with_head(self._trained, head_of(self.classifier))
        return run_model(model, samples, self.preprocess, context, split)

    def exported(self, temperature: float) -> ExportedNetwork:
        module = DeployModule(self.classifier, temperature, self.network.task)

        def reference(samples: Sequence[Sample], images: NDArray[np.uint8]) -> Reference:
            return torch_reference(module, images)

        model = with_head(self._trained, head_of(self.classifier), temperature)
        tensors = carried_tensors(self.classifier.backbone, trained=bool(self.recipe.trainable))
        kept = KeptWeights(head_of(self.classifier), self.classifier.pooling, self.network.seed, tensors)
        return ExportedNetwork(model, self.network.facts, self.preprocess, EXPORTER, reference, kept)

    @cached_property
    def _trained(self) -> bytes:
        """The trained network as a template (`finetune.export.template`). Cached, so use it only after training."""
        return fold(self.network.traced(), DeployModule(self.classifier, task=self.network.task))
