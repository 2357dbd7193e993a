"""A learner that fits only the head, on the features of a frozen backbone, without optimiser steps. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.export.agreement import Reference, parity_samples
from finetune.export.pack import ExportedNetwork, KeptWeights
from finetune.export.template import Head
from finetune.features.rows import Views, pooled_features
from finetune.features.solve import head_logits
from finetune.runs.learner import run_model
from finetune.runs.prepare import Prepared
from finetune.storage.files import write_atomic
from finetune.training.choices import Choices
from finetune.training.context import Trained, TrainingContext
from finetune.training.head import solve_head


class SolvedLearner:
    """A `Learner` of a built or known network and the head that is solved on it."""

    def __init__(self, prepared: Prepared) -> None:
        self.network = prepared.network
        self.preprocess = prepared.resolved.preprocess
        self.recipe = prepared.resolved.recipe
        self.pooling = prepared.resolved.spec.model.head.pooling
        self._head: Head | None = None

    @property
    def head(self) -> Head:
        """The solved head; only available after `train`."""
        assert self._head is not None, "train comes first"
        return self._head

    def begin_reference(self, samples: Sequence[Sample]) -> None:
        self.network.begin_reference(parity_samples(samples), self.preprocess)

    def train(self, context: TrainingContext, decided: Choices | None) -> Trained:
        before = self.network.frozen_digest()
        # start with an empty journal: an earlier attempt that was killed may have left lines in it
        write_atomic(context.run.metrics, lambda stream: stream.write(b""))
        head, cost = solve_head(self.network.prefix, self.preprocess, self.recipe, context)
        self._head = Head(head.weight, head.bias)
        facts, n_of_head = self.network.facts, head.weight.size + head.bias.size
        return Trained(
            summary=f"{self.recipe.method}: the head is solved on frozen features, L2 {head.l2:g} ({head.chosen_by})",
            cost=cost,
            n_trainable=n_of_head,
            n_parameters=facts.n_parameters + n_of_head,
            frozen={
                "stages": [stage.name for stage in facts.stages],
                "digest_before": before,
                "digest_after": self.network.frozen_digest(),
            },
            choices=Choices(l2=head.l2),
            head=head,
        )

    def predict(
        self, samples: tuple[Sample, ...], context: TrainingContext, split: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Apply the head to cached features. On a GPU, whose features are rounded differently, run the exported graph instead."""
        if context.compute.device != "cpu":
            return run_model(self.network.with_head(self.head, 1.0), samples, self.preprocess, context, split)
        features = pooled_features(self.network.prefix, samples, Views(self.preprocess), context.features())
        return head_logits(features, self.head.weight, self.head.bias), features

    def exported(self, temperature: float) -> ExportedNetwork:
        def reference(samples: Sequence[Sample], images: NDArray[np.uint8]) -> Reference:
            return self.network.reference(self.head, temperature, samples, images, self.preprocess)

        model = self.network.with_head(self.head, temperature)
        kept = KeptWeights(self.head, self.pooling, self.network.seed, self.network.tensors())
        return ExportedNetwork(model, self.network.facts, self.preprocess, self.network.exporter, reference, kept)
