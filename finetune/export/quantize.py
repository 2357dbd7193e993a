"""Quantise an exported model to int8, and keep the result only if it is as good as float32.

Weights and activations are quantised statically (QDQ) by onnxruntime.quantization, weights per channel. Only the nodes that the
embedding depends on are quantised, from the first convolution or matrix product on. Normalisation, pooled features, head and
class activation map stay float32, so the map stays exact.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from finetune.runtime.session import INPUT_NAME, open_session
from finetune.tasks import Task

N_CALIBRATION = 64  # images; with 256 the outputs do not agree better with float32
MAX_LOSS = 0.01  # of the task's headline metric
LOGITS_TOLERANCE = 0.05  # relative to the largest logit; int8 kernels of other processors round differently

_CALIBRATION_BATCH = 8
_HEAVY = ("Conv", "MatMul")
_TYPES = (*_HEAVY, "Add", "Mul", "Clip", "Relu", "LeakyRelu", "Sigmoid", "MaxPool", "AveragePool", "Concat", "Split", "Pad")
_SHAPES = ("Reshape", "Transpose")  # their output is quantised if their input is


@dataclass(frozen=True)
class Quantization:
    """The result of a quantisation. If `kept` is False, int8 lost too much of the metric, and the model stays float32."""

    kept: bool
    n_images: int
    metric: str  # the task's headline
    float32: float
    int8: float
    bytes_float32: int
    bytes_int8: int

    @property
    def sentence(self) -> str:
        """One sentence with the metric in int8 and float32, and what was decided."""
        change = f"{self.metric} on {self.n_images} images is {self.int8:.4f}, in float32 {self.float32:.4f}"
        if self.kept:
            return f"quantised to int8: {change}; {self.bytes_float32 / self.bytes_int8:.1f} times smaller"
        return f"not quantised, the model stays float32: in int8 {change}, and more than {MAX_LOSS:.0%} is not accepted"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sentence": self.sentence}


def quantize_if_as_good(
    model: bytes, calibration: np.ndarray, images: np.ndarray, targets: np.ndarray, *, task: Task, threads: int
) -> tuple[bytes, Quantization]:
    """Return the int8 model, or `model` itself if int8 loses more than `MAX_LOSS` of the task's headline metric; and the result.

    Args:
        calibration: (N, h, w, 3) uint8, training images that the range of every activation is measured on.
        images, targets: (M, h, w, 3) uint8 and their encoded targets, which the metric is measured on.
    """
    quantised = quantize(model, calibration)
    answers = [_logits(candidate, images, threads) for candidate in (model, quantised)]
    float32, int8 = (task.headline.compute(task.image_results(logits, targets)) for logits in answers)
    outcome = Quantization(
        kept=int8 >= float32 - MAX_LOSS,
        n_images=len(images),
        metric=task.headline.key,
        float32=float32,
        int8=int8,
        bytes_float32=len(model),
        bytes_int8=len(quantised),
    )
    return (quantised if outcome.kept else model), outcome


def quantize(model: bytes, calibration: np.ndarray) -> bytes:
    """Return the graph with int8 convolutions and matrix products, calibrated on images (N, h, w, 3) uint8."""
    with tempfile.TemporaryDirectory() as folder, _root_logger_silenced():
        given, made = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        given.write_bytes(model)
        quantize_static(
            given,
            made,
            _Batches(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*_TYPES, *_SHAPES],
            nodes_to_quantize=_nodes_to_quantize(onnx.load_model_from_string(model)),
            per_channel=True,
            reduce_range=True,  # on processors without VNNI, products of full 8-bit factors saturate
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        return made.read_bytes()


class _Batches(CalibrationDataReader):
    """The calibration images in batches, as onnxruntime.quantization reads them."""

    def __init__(self, images: np.ndarray) -> None:
        self._batches: Iterator[np.ndarray] = iter(
            images[start : start + _CALIBRATION_BATCH] for start in range(0, len(images), _CALIBRATION_BATCH)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT_NAME: batch}


def _nodes_to_quantize(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that the embedding depends on, from the first convolution or matrix product on.

    The nodes of the graph are in execution order.
    """
    nodes = list(model.graph.node)
    wanted = {"embedding"}
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
    begun: set[str] = set()
    chosen = []
    for node in nodes:
        if node.op_type in _HEAVY or begun.intersection(node.input):
            begun.update(node.output)
            if wanted.intersection(node.output) and "embedding" not in node.output:
                chosen.append(node.name)
    return chosen


def _logits(model: bytes, images: np.ndarray, threads: int) -> np.ndarray:
    """Return the logits (N, C) of images (N, h, w, 3)."""
    session = open_session(model, threads=threads)
    return np.concatenate([session.run(["logits"], {INPUT_NAME: image[None]})[0] for image in images])


@contextmanager
def _root_logger_silenced() -> Iterator[None]:
    """Silence the root logger during the block: the quantiser advises to optimise the graph first, which has been done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
