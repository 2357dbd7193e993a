"""The protocol of a learner, which a run trains, uses for predictions, and exports. Torch-free.

There are two implementations: `finetune.runs.solved` fits only the head, on the features of a frozen backbone, without optimiser
steps; `finetune.runs.stepped` takes optimiser steps in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.preprocess import Preprocess
from finetune.data.dataset import Sample
from finetune.data.loader import EvalLoader
from finetune.export.pack import ExportedNetwork
from finetune.progress import Progress
from finetune.runtime.session import open_session
from finetune.training.choices import Choices
from finetune.training.context import Trained, TrainingContext

BATCH_SIZE = 16  # at which ONNX Runtime has the highest throughput on a CPU


class Learner(Protocol):
    """A network with a head. Call `begin_reference` if it will be exported, `train`, then `predict` and `exported`."""

    def begin_reference(self, samples: Sequence[Sample]) -> None:
        """Start computing beside the training what the export will be compared with, as far as training does not change it."""
        ...

    def train(self, context: TrainingContext, decided: Choices | None) -> Trained:
        """Train, or resume the training that an earlier process of the same run began.

        Args:
            decided: what an earlier run chose on its validation images; then nothing is chosen here, and the dataset needs no val
                split.
        """
        ...

    def predict(
        self, samples: tuple[Sample, ...], context: TrainingContext, split: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return logits (N, C) and embeddings (N, D) of N samples, as the exported graph computes them."""
        ...

    def exported(self, temperature: float) -> ExportedNetwork:
        """Return the trained network as an ONNX file, with the reference that the export is compared with.

        Args:
            temperature: that the logits are divided by before the link function.
        """
        ...


def run_model(
    model: bytes, samples: tuple[Sample, ...], preprocess: Preprocess, context: TrainingContext, split: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Run a serialised ONNX model on N samples; return logits (N, C) and embeddings (N, D)."""
    threads = context.compute.threads
    session = open_session(model, threads=threads)
    logits: list[NDArray[np.float32]] = []
    embedding: list[NDArray[np.float32]] = []
    done = 0
    for batch in EvalLoader(samples, preprocess, BATCH_SIZE, threads):
        outputs = session.run(["logits", "embedding"], {"images": batch.images})
        logits.append(outputs[0])
        embedding.append(outputs[1])
        done += len(batch.indices)
        context.progress(Progress("evaluating", done, len(samples), "images", message=f"evaluating {split}"))
    return np.concatenate(logits), np.concatenate(embedding)
