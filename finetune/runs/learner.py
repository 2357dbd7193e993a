"""The protocol of what a run trains: it is trained, answers samples, and is exported. Torch-free.

There are two implementations. A solved learner (`finetune.runs.solved`) fits the head on a frozen backbone in closed form; a
stepped learner (`finetune.runs.stepped`) takes optimiser steps, in torch.
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
from finetune.training.choices import Choices
from finetune.training.context import Trained, TrainingContext

BATCH_SIZE = 16  # where ONNX Runtime is fastest on a CPU


class Learner(Protocol):
    """A network with a head that is trained once and then predicts."""

    def train(self, context: TrainingContext, decided: Choices | None) -> Trained:
        """Train, or resume where an earlier process of the same run stopped.

        Args:
            decided: the choices of an earlier run; with them nothing is chosen here, and the dataset needs no val split.
        """
        ...

    def answer(
        self, samples: tuple[Sample, ...], context: TrainingContext, split: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return logits (N, C) and embeddings (N, D) of samples, as the exported graph computes them."""
        ...

    def exported(self, temperature: float) -> ExportedNetwork:
        """Return the trained network as an ONNX file, with what its export is compared with."""
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
