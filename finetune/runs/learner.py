"""What a run computes with: a learner trains, answers, and is exported. The rest of a run knows no more of it. Torch-free.

There are two kinds. A solved learner (`finetune.runs.solved`) finds a head on a network that does not change, a stepped learner
(`finetune.runs.stepped`) takes optimiser steps, in torch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.preprocess import Preprocess
from finetune.data.dataset import Sample
from finetune.data.loader import EvalLoader
from finetune.export.pack import ExportedNetwork
from finetune.progress import Progress
from finetune.runtime.session import open_session
from finetune.train.choices import Choices
from finetune.train.context import Trained, TrainingContext

BATCH_SIZE = 16  # where ONNX Runtime is fastest on a CPU


class Learner(Protocol):
    """A network that is trained once, and then asked."""

    def train(self, context: TrainingContext, decided: Choices | None) -> Trained:
        """Train, or go on where an earlier session of the same run stopped.

        Args:
            decided: what an earlier run chose; then nothing is chosen here, and the dataset needs no val split.
        """
        ...

    def answer(
        self, samples: tuple[Sample, ...], context: TrainingContext, split: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return logits (N, C) and embeddings (N, D) of samples, as the exported graph computes them."""
        ...

    def exported(self, temperature: float) -> ExportedNetwork:
        """Return the trained network as it is shipped."""
        ...


def run_model(
    model: bytes, samples: tuple[Sample, ...], preprocess: Preprocess, context: TrainingContext, split: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return logits (N, C) and embeddings (N, D) of samples through ONNX Runtime."""
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
