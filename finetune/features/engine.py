"""The protocols of a frozen prefix and of the engine that runs it, and the engine on ONNX Runtime. Torch-free.

A prefix is the part of a network below a cut. There are two implementations: that of a torch classifier
(`finetune.features.prefix`) and that of a network that an earlier run has exported (`finetune.runs.known`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from finetune.events import EventCallback
from finetune.runtime.device import Device
from finetune.storage.files import read_json

GraphSource = Callable[[], bytes]  # an ONNX file with an output `embedding`, made when it is asked for

LEAST_AGREEMENT = 0.9999
INPUT_NAME, OUTPUT_NAME = "images", "embedding"


class Engine(Protocol):
    """Runs a prefix."""

    @property
    def name(self) -> str:
        """Part of the keys of the rows that it computes, because engines round differently."""
        ...

    @property
    def batch_size(self) -> int:
        """Images per call, chosen for speed."""
        ...

    @property
    def concurrent(self) -> bool:
        """Whether several threads should call `run` at once, each using one core."""
        ...

    @property
    def cores(self) -> int:
        """Cores that one call of `run` keeps busy."""
        ...

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, h, w, 3) uint8 -> (B, *shape) float32."""
        ...


class Prefix(Protocol):
    """The part of a network below a cut; with the cut at the end, from pixels to the pooled embedding that the head is given."""

    @property
    def backbone(self) -> str:
        """The backbone's name, for messages."""
        ...

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one image's activation at the cut."""
        ...

    @property
    def digest(self) -> str:
        """The sha256 over all that decides the activation: architecture, weights, statistics and, at the end, pooling."""
        ...

    def expected_engine(self, device: Device, folder: Path) -> str:
        """Return the name of the engine that `open_engine` will most likely give."""
        ...

    def open_engine(self, images: NDArray[np.uint8], device: Device, folder: Path, event: EventCallback) -> Engine:
        """Return the fastest engine that is known to compute what torch computes.

        Args:
            images: a few real ones, on which an engine that is new must agree with torch.
            folder: where the exported graph and the verdict on it are kept for later runs.
        """
        ...


@dataclass(frozen=True)
class OnnxEngine:
    """ONNX Runtime, one core a call.

    As many batches at once as there are cores cost less than one batch spread over all of them: on two cores and with decoding
    in the same threads 11.5 ms of CPU an image, against 13.5, or 17 with spinning.
    """

    session: onnxruntime.InferenceSession

    concurrent = True
    cores = 1
    batch_size = 8  # per thread; more falls out of the cores' caches (8.3 ms an image at 4, 9.4 at 16)

    @property
    def name(self) -> str:
        return onnx_engine_name()

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        output: NDArray[np.float32] = self.session.run(None, {INPUT_NAME: images})[0]
        return output


def onnx_engine_name() -> str:
    """Return the name of `OnnxEngine` in the keys of what it computes."""
    return f"onnxruntime {onnxruntime.__version__}"


def refused(folder: Path) -> str | None:
    """Return why ONNX Runtime was found unfit for a prefix before; None if it was not.

    Args:
        folder: where the verdict on the prefix is kept.
    """
    verdict = folder / "engine.json"
    refusal: str | None = read_json(verdict).get("refused") if verdict.exists() else None
    return refusal


def agreement(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Return the least of 2ab / (a² + b²) over matching rows: their cosine where they are equally long, less where they are not.

    NaN if anything is not finite.
    """
    a, b = (rows.reshape(len(rows), -1).astype(np.float64) for rows in (first, second))
    squares = (a * a).sum(axis=1) + (b * b).sum(axis=1)
    return float(np.where(squares == 0, 1.0, 2 * (a * b).sum(axis=1) / np.where(squares == 0, 1.0, squares)).min())


def only_embedding(graph: bytes) -> bytes:
    """Return an ONNX file with the embedding as its only output; what only served the others is pruned by the session."""
    import onnx  # a tenth of a second that a run without missing rows does not need

    model = onnx.load_model_from_string(graph)
    kept = [output for output in model.graph.output if output.name == OUTPUT_NAME]
    if not kept:
        raise ValueError(f"the graph has no output named {OUTPUT_NAME!r}")
    del model.graph.output[:]
    model.graph.output.extend(kept)
    data: bytes = model.SerializeToString()
    return data
