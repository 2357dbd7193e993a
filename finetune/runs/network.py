"""A pretrained network whose head is still to be found: what every run begins with.

There are two kinds. A built network (`finetune.runs.build`) is live in torch: it can be trained, and says itself what it
computes. A known network (`finetune.runs.known`) is what an earlier run left of one: enough to find a head and to export it,
without torch.
Torch-free.
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


class Network(Protocol):
    """A backbone that does not change, and everything that a head on it needs."""

    @property
    def facts(self) -> BackboneFacts: ...

    @property
    def exporter(self) -> str:
        """What made the ONNX graph, as the manifest says it."""
        ...

    @property
    def prefix(self) -> Prefix:
        """From pixels to the embedding that the head gets."""
        ...

    def try_export(self) -> None:
        """Make sure, before anything is trained, that the network can be exported.

        Raises:
            ExportError: the backbone could be trained, but not served.
        """
        ...

    def frozen_digest(self) -> str:
        """Return the sha256 over all parameters and buffers of the backbone, as they are now."""
        ...

    def with_head(self, head: Head, temperature: float) -> bytes:
        """Return the network with this head as one ONNX file."""
        ...

    def has_reference(self, samples: Sequence[Sample], preprocess: Preprocess) -> bool:
        """Return whether `reference` can be had for these samples, framed in this way."""
        ...

    def reference(
        self, head: Head, temperature: float, samples: Sequence[Sample], images: NDArray[np.uint8], preprocess: Preprocess
    ) -> Reference:
        """Return what torch says about samples with this head.

        Args:
            images: (N, h, w, 3), the samples framed by `preprocess`.
        """
        ...
