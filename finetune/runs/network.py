"""The protocol of a pretrained network before its head is trained. Torch-free.

There are two implementations. A built network (`finetune.runs.build`) is a torch module that can be trained. A known network
(`finetune.runs.known`) was recorded by an earlier run, and is enough to solve a head on and to export it without torch.
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
    """A frozen backbone, and everything that a head on it needs."""

    @property
    def facts(self) -> BackboneFacts: ...

    @property
    def exporter(self) -> str:
        """The tool that made the ONNX graph, for the manifest."""
        ...

    @property
    def prefix(self) -> Prefix:
        """The whole backbone with pooling: from pixels to the embedding that the head is given."""
        ...

    @property
    def seed(self) -> int:
        """What the backbone was drawn with, where it is not pretrained."""
        ...

    def try_export(self) -> None:
        """Check, before anything is trained, that the network can be exported.

        Raises:
            ExportError: the backbone can be trained, but not exported.
        """
        ...

    def frozen_digest(self) -> str:
        """Return the sha256 of all parameters and buffers of the backbone."""
        ...

    def with_head(self, head: Head, temperature: float) -> bytes:
        """Return the network with this head as one ONNX file."""
        ...

    def tensors(self) -> Tensors:
        """Return the tensors of the backbone that a bundle must keep: none where they are the pretrained ones still."""
        ...

    def has_reference(self, samples: Sequence[Sample], preprocess: Preprocess) -> bool:
        """Return whether `reference` can answer for these samples, preprocessed in this way."""
        ...

    def reference(
        self, head: Head, temperature: float, samples: Sequence[Sample], images: NDArray[np.uint8], preprocess: Preprocess
    ) -> Reference:
        """Return what torch computes for samples with this head, which an export is compared with.

        Args:
            images: (N, h, w, 3) uint8, the samples preprocessed by `preprocess`.
        """
        ...
