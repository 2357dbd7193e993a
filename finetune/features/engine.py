"""The protocols of a frozen prefix and of the engine that runs it, and the engine on ONNX Runtime. Torch-free.

A prefix is the part of a network before a cut. There are two implementations, for a torch classifier (`finetune.features.prefix`)
and for a network that an earlier run exported (`finetune.runs.known`).
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
from finetune.runtime.session import INPUT_NAME
from finetune.storage.files import read_json

GraphSource = Callable[[], bytes]  # returns an ONNX file with an output `embedding`; the file is made when this is called

LEAST_AGREEMENT = 0.9999  # between the outputs of two engines, as `agreement` computes it
OUTPUT_NAME = "embedding"


class Engine(Protocol):
    """An implementation that runs a prefix."""

    @property
    def name(self) -> str:
        """The name, which is part of the keys of cached rows, because engines round differently."""
        ...

    @property
    def batch_size(self) -> int:
        """The fastest number of images per call."""
        ...

    @property
    def concurrent(self) -> bool:
        """Whether several threads should call `run` at once, each using one core."""
        ...

    @property
    def cores(self) -> int:
        """The number of cores that one call of `run` uses."""
        ...

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the activations (B, *row_shape) float32 of images (B, h, w, 3) uint8."""
        ...


class Prefix(Protocol):
    """The part of a network before a cut, from pixels on. If the cut is before the head, its output is the pooled embedding."""

    @property
    def backbone(self) -> str:
        """The name of the backbone, for messages."""
        ...

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of the activation of one image at the cut."""
        ...

    @property
    def digest(self) -> str:
        """The sha256 of everything that determines the activation: architecture, weights, running statistics, pooling."""
        ...

    def expected_engine(self, device: Device, folder: Path) -> str:
        """Return the name of the engine that `open_engine` will most likely return."""
        ...

    def open_engine(self, images: NDArray[np.uint8], device: Device, folder: Path, event: EventCallback) -> Engine:
        """Return the fastest engine whose output agrees with torch's.

        Args:
            images: a few images of the dataset, on which a newly exported graph is compared with torch.
            folder: for the exported graph and the result of the comparison, which later runs read.
        """
        ...


@dataclass(frozen=True)
class OnnxEngine:
    """ONNX Runtime with one core per call.

    Running as many batches at a time as there are cores is faster than spreading one batch over all cores: on two cores, with
    decoding in the same threads, it took 11.5 ms of CPU time per image instead of 13.5 ms (17 ms with spinning).
    """

    session: onnxruntime.InferenceSession

    concurrent = True
    cores = 1
    batch_size = 8  # per thread; larger batches exceed the cores' caches (8.3 ms per image at 4, 9.4 ms at 16)

    @property
    def name(self) -> str:
        return onnx_engine_name()

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        output: NDArray[np.float32] = self.session.run(None, {INPUT_NAME: images})[0]
        return output


def onnx_engine_name() -> str:
    """Return the name of `OnnxEngine` in the keys of cached rows."""
    return f"onnxruntime {onnxruntime.__version__}"


def refused(folder: Path) -> str | None:
    """Return why an earlier comparison found that ONNX Runtime cannot be used for a prefix; None if it did not find that.

    Args:
        folder: with the result of the comparison.
    """
    try:
        refusal: str | None = read_json(folder / "engine.json").get("refused")
    except FileNotFoundError:
        return None
    return refusal


def agreement(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Return the minimum over rows of 2ab / (a² + b²), which is the cosine for vectors of equal length and less for others.

    The result is NaN if a value is not finite.
    """
    a, b = (rows.reshape(len(rows), -1).astype(np.float64) for rows in (first, second))
    squares = (a * a).sum(axis=1) + (b * b).sum(axis=1)
    return float(np.where(squares == 0, 1.0, 2 * (a * b).sum(axis=1) / np.where(squares == 0, 1.0, squares)).min())


def only_embedding(graph: bytes) -> bytes:
    """Return an ONNX file with the embedding as its only output; the session prunes the nodes that only the others need."""
    import onnx  # takes a tenth of a second, and a run without missing rows does not need it

    model = onnx.load_model_from_string(graph)
    kept = [output for output in model.graph.output if output.name == OUTPUT_NAME]
    if not kept:
        raise ValueError(f"the graph has no output named {OUTPUT_NAME!r}")
    del model.graph.output[:]
    model.graph.output.extend(kept)
    data: bytes = model.SerializeToString()
    return data
