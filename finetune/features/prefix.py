"""Run the frozen prefix of a classifier fast: with ONNX Runtime on a CPU, with PyTorch and autocast on a GPU.

On a CPU, ONNX Runtime is several times faster than eager PyTorch. It is used only if its output on images of the dataset agrees
with torch's. If it cannot run a backbone, or differs, PyTorch is used, and an event says why.
"""

from __future__ import annotations

import copy
import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finetune.events import EventCallback, PrefixEngine
from finetune.features.engine import (
    LEAST_AGREEMENT,
    OUTPUT_NAME,
    Engine,
    GraphSource,
    OnnxEngine,
    agreement,
    only_embedding,
    onnx_engine_name,
    refused,
)
from finetune.model.classifier import Classifier
from finetune.model.cut import cut_at
from finetune.model.onnx_program import onnx_program
from finetune.model.threads import on_threads
from finetune.runtime.device import Device
from finetune.runtime.session import ORT_ERRORS, open_session
from finetune.storage.files import read_json, write_atomic, write_json

_GRAPH_ERRORS = (torch.onnx.errors.OnnxExporterError, *ORT_ERRORS)


@dataclass(frozen=True)
class ClassifierPrefix:
    """The `Prefix` of a torch classifier: its stages before `stage`, or all of them with pooling.

    Args:
        stage: the cut is before this stage; the number of stages: the cut is before the head.
        graph: returns an ONNX file with the embedding, if the classifier has been exported already; exporting takes seconds.
    """

    classifier: Classifier
    stage: int
    graph: GraphSource | None = None

    @property
    def backbone(self) -> str:
        return self.classifier.backbone.name

    @property
    def row_shape(self) -> tuple[int, ...]:
        return activation_shape(self.classifier, self.stage)

    @cached_property
    def digest(self) -> str:
        return prefix_digest(self.classifier, self.stage)

    def expected_engine(self, device: Device, folder: Path) -> str:
        usable = device == "cpu" and refused(folder) is None
        return onnx_engine_name() if usable else torch_engine_name(device, autocast=True)

    def open_engine(self, images: NDArray[np.uint8], device: Device, folder: Path, event: EventCallback) -> Engine:
        whole = self.stage == len(self.classifier.backbone.stages)
        graph = self.graph if whole else None
        return open_engine(PixelPrefix(self.classifier, self.stage), images, device, folder, graph, event)


def embedding_prefix(classifier: Classifier, graph: GraphSource | None = None) -> ClassifierPrefix:
    """Return the whole backbone with pooling as a prefix, from pixels to the embedding."""
    return ClassifierPrefix(classifier, len(classifier.backbone.stages), graph)


def activation_shape(classifier: Classifier, stage: int) -> tuple[int, ...]:
    """Return the shape of the activation of one image at the cut before `stage`."""
    stages = classifier.backbone.stages
    return (classifier.head.in_features,) if stage == len(stages) else stages[stage - 1].output_shape


class PixelPrefix(nn.Module):
    """A copy of a classifier's stages before `stage`, in eval mode, from uint8 pixels to the activation at the cut.

    If `stage` is the number of stages, the output is the pooled embedding.
    """

    def __init__(self, classifier: Classifier, stage: int) -> None:
        super().__init__()
        cut = cut_at(classifier, stage)
        self.backbone_name = classifier.backbone.name
        self.input_size_px = classifier.backbone.preprocess.input_size_px
        self.classifier, self.prefix = copy.deepcopy((classifier, cut.prefix))
        self.requires_grad_(False)
        self.train()  # clears what some attention layers compute from their weights in eval mode and cache
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        activation: Tensor = self.prefix(self.classifier.normalise(images))
        return activation


def prefix_digest(classifier: Classifier, stage: int) -> str:
    """Return the sha256 of everything that determines the activation at the cut before `stage`.

    It covers the architecture, weights, running statistics and pixel normalisation and, if the cut is before the head, the
    pooling.
    """
    backbone = classifier.backbone
    stage_of = backbone.layout.tensor_stage
    pooling = classifier.pooling if stage == len(backbone.stages) else ""
    preprocess = backbone.preprocess
    digest = hashlib.sha256(
        f"{backbone.name} timm {timm.__version__} {stage} {pooling} {preprocess.mean} {preprocess.std}".encode()
    )
    for name, tensor in sorted([*backbone.module.named_parameters(), *backbone.module.named_buffers()]):
        if stage_of[name] < stage:
            digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class TorchEngine:
    """Eager PyTorch, on a GPU with float16 autocast if `autocast` is set."""

    module: PixelPrefix
    device: Device
    autocast: bool

    concurrent = False  # PyTorch uses several threads itself

    @property
    def name(self) -> str:
        return torch_engine_name(self.device, self.autocast)

    @property
    def cores(self) -> int:
        return 1 if self.device == "cuda" else torch.get_num_threads()

    @property
    def batch_size(self) -> int:
        return 64 if self.device == "cuda" else 8

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = torch.from_numpy(images)
        if self.device == "cuda":
            pixels = pixels.pin_memory().to("cuda", non_blocking=True)
        with torch.inference_mode(), torch.autocast(self.device, dtype=torch.float16, enabled=self.autocast):
            activation: Tensor = self.module(pixels)
        rows: NDArray[np.float32] = activation.float().cpu().numpy()
        return rows


def torch_engine_name(device: Device, autocast: bool) -> str:
    """Return the name of `TorchEngine` in the keys of cached rows."""
    return f"torch {torch.__version__} {device} {'float16' if autocast and device == 'cuda' else 'float32'}"


def open_engine(
    module: PixelPrefix,
    images: NDArray[np.uint8],
    device: Device,
    store: Path,
    graph: GraphSource | None,
    event: EventCallback,
) -> Engine:
    """Return the fastest engine whose output agrees with torch's on `images`, a few images of the dataset.

    Args:
        store: folder for the exported graph and the result of the comparison, which later runs read.
        graph: returns an ONNX file that computes the embedding, if the classifier has been exported already; exporting takes
            seconds.
    """
    if device == "cuda":
        return _open_cuda(module, images, event)
    plain = TorchEngine(module, "cpu", autocast=False)
    if (refusal := refused(store)) is None:
        try:
            return _open_onnx(module, images, plain, store, graph)
        except _GRAPH_ERRORS as error:
            refusal = f"ONNX Runtime cannot run it ({_first_line(error)})"
        except _Disagreement as error:
            refusal = str(error)
        write_json(store / "engine.json", {"refused": refusal})
    event(PrefixEngine(f"the frozen part of {module.backbone_name} runs in eager PyTorch, which is slower: {refusal}"))
    return plain


class _Disagreement(Exception):
    """The output of an engine differs from torch's."""


def _open_onnx(
    module: PixelPrefix, images: NDArray[np.uint8], plain: TorchEngine, store: Path, graph: GraphSource | None
) -> OnnxEngine:
    """Return the stored engine, or export one and compare it with torch.

    Raises:
        _Disagreement: the outputs differ.
    """
    file, comparison = store / "prefix.onnx", store / "engine.json"
    if (kept := _kept_graph(file, comparison)) is not None:
        return OnnxEngine(open_session(kept))
    model = export_prefix(module) if graph is None else only_embedding(graph())
    engine = OnnxEngine(open_session(model))
    with on_threads(1):  # meanwhile the other cores decode images
        cosine = agreement(engine.run(images), plain.run(images))
    if not cosine > LEAST_AGREEMENT:
        raise _Disagreement(f"ONNX Runtime's output has a cosine of {cosine:.6f} with PyTorch's, {LEAST_AGREEMENT} is required")
    write_atomic(file, lambda stream: stream.write(model))
    write_json(comparison, {"sha256": hashlib.sha256(model).hexdigest(), "cosine": cosine, "images": len(images)})
    return engine


def _kept_graph(file: Path, comparison: Path) -> bytes | None:
    """Return a graph that an earlier run exported and compared; None if there is none, or none any more."""
    try:
        model, compared = file.read_bytes(), read_json(comparison).get("sha256")
    except FileNotFoundError:
        return None
    return model if hashlib.sha256(model).hexdigest() == compared else None


def _open_cuda(module: PixelPrefix, images: NDArray[np.uint8], event: EventCallback) -> TorchEngine:
    """Return the engine with float16 autocast if it agrees with float32, else the one without, with an event."""
    on_device = module.to("cuda")
    plain, fast = TorchEngine(on_device, "cuda", autocast=False), TorchEngine(on_device, "cuda", autocast=True)
    cosine = agreement(fast.run(images), plain.run(images))
    if cosine > LEAST_AGREEMENT:
        return fast
    event(
        PrefixEngine(f"the frozen part of {module.backbone_name} runs in float32: float16 has a cosine of {cosine:.6f} with it")
    )
    return plain


def export_prefix(module: PixelPrefix) -> bytes:
    """Return the prefix as one ONNX file, with the input `images` (B, h, w, 3) uint8 and the activation as output."""
    stream = io.BytesIO()
    onnx.save_model(onnx_program(module, module.input_size_px, [OUTPUT_NAME]).model_proto, stream)
    return stream.getvalue()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
