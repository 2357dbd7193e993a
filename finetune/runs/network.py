"""The protocol of a network before its head is trained. Torch-free.

There are two implementations: a built network (`finetune.runs.build`) is a torch module that can be trained; a known network
(`finetune.runs.known`) was recorded by an earlier run, and a head can be solved on it and exported without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.preprocess import Preprocess
from finetune.data.dataset import Sample
from finetune.export.agreement import Reference
from finetune.export.template import Head
from finetune.features.engine import Prefix
from finetune.model.facts import BackboneFacts
from finetune.model.tensors import Tensors


class Network(Protocol):
    """A frozen backbone, with what is needed to solve a head on it and to export both."""

    @property
    def facts(self) -> BackboneFacts:
        """The description of the backbone."""
        ...

    @property
    def exporter(self) -> str:
        """The name of the tool that made the ONNX graph, for the manifest."""
        ...

    @property
    def prefix(self) -> Prefix:
        """The whole backbone with pooling, from pixels to the embedding, as a frozen prefix."""
        ...

    @property
    def seed(self) -> int:
        """The seed that the backbone was initialised with if it is not pretrained."""
        ...

    def try_export(self) -> None:
        """Check, before anything is trained, that the network can be exported.

        Raises:
            ExportError: the backbone cannot be exported, although it could be trained.
        """
        ...

    def frozen_digest(self) -> str:
        """Return the sha256 of all parameters and buffers of the backbone."""
        ...

    def with_head(self, head: Head, temperature: float) -> bytes:
        """Return the network with this head and temperature as one ONNX file."""
        ...

    def tensors(self) -> Tensors:
        """Return the backbone's tensors that a bundle must contain: none if they still are the published pretrained weights."""
        ...

    def begin_reference(self, samples: Sequence[Sample], preprocess: Preprocess) -> None:
        """Start, in another thread, the part of `reference` that does not depend on the head, if it is not available already."""
        ...

    def reference(
        self, head: Head, temperature: float, samples: Sequence[Sample], images: NDArray[np.uint8], preprocess: Preprocess
    ) -> Reference:
        """Return the network's outputs for N samples with this head, which an export is compared with.

        Args:
            images: (N, h, w, 3) uint8, the samples preprocessed by `preprocess`.
        """
        ...
