"""The frozen prefix of a classifier as something that runs fast: ONNX Runtime on a CPU, autocast torch on a GPU.

On a CPU, ONNX Runtime is several times faster than eager PyTorch, but it is another implementation, so it is trusted only after
its output on real images agreed with torch's. Where it cannot run a backbone, or differs, torch does the work and an event says
why. Knows networks and pixels; does not know files of images or caches of results.
"""

from __future__ import annotations

import copy
import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finetune.events import EventCallback, PrefixEngine
from finetune.model.classifier import Classifier
from finetune.model.cut import cut_at
from finetune.runtime.device import Device
from finetune.runtime.session import ORT_ERRORS, open_session
from finetune.storage.files import read_json, sha256_file, write_atomic, write_json

GraphSource = Callable[[], bytes]  # an ONNX file with an output `embedding`, made when it is asked for

LEAST_AGREEMENT = 0.9999
OPSET = 20
INPUT_NAME, OUTPUT_NAME = "images", "embedding"

_GRAPH_ERRORS = (torch.onnx.errors.OnnxExporterError, *ORT_ERRORS)


class Engine(Protocol):
    """Runs a prefix."""

    @property
    def name(self) -> str:
        """Part of the keys of what it computes: another engine rounds otherwise."""
        ...

    @property
    def batch_size(self) -> int:
        """Images a call, for speed."""
        ...

    @property
    def concurrent(self) -> bool:
        """Whether several threads should call `run` at once, each for one core."""
        ...

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the activations of images (B, h, w, 3) uint8, as (B, *shape) float32."""
        ...


def activation_shape(classifier: Classifier, stage: int) -> tuple[int, ...]:
    """Return the shape of one image's activation at the cut before `stage`."""
    stages = classifier.backbone.stages
    return (classifier.head.in_features,) if stage == len(stages) else stages[stage - 1].output_shape


class PixelPrefix(nn.Module):
    """A private copy of a classifier's stages below `stage`, in eval mode: uint8 pixels to the activation at the cut.

    With `stage` equal to the number of stages, to the pooled embedding that the head gets.
    """

    def __init__(self, classifier: Classifier, stage: int) -> None:
        super().__init__()
        cut = cut_at(classifier, stage)
        self.backbone_name = classifier.backbone.name
        self.input_size_px = classifier.backbone.preprocess.input_size_px
        self.classifier, self.prefix = copy.deepcopy((classifier, cut.prefix))
        self.requires_grad_(False)
        self.train()  # some attention layers cache in eval mode what they make of their weights; only this drops it
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        activation: Tensor = self.prefix(self.classifier.normalise(images))
        return activation


def prefix_digest(classifier: Classifier, stage: int) -> str:
    """Return a sha256 over all that decides the activation below `stage`: architecture, weights, statistics, pooling."""
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
    """PyTorch, eager; on a GPU with float16 autocast unless that differs too much."""

    module: PixelPrefix
    device: Device
    autocast: bool

    concurrent = False  # PyTorch brings its own threads

    @property
    def name(self) -> str:
        return torch_engine_name(self.device, self.autocast)

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


@dataclass(frozen=True)
class OnnxEngine:
    """ONNX Runtime, one core a call.

    As many batches at once as there are cores cost less than one batch spread over all of them: on two cores and with decoding
    in the same threads 11.5 ms of CPU an image, against 13.5, or 17 with spinning.
    """

    session: onnxruntime.InferenceSession

    concurrent = True
    batch_size = 8  # per thread; more falls out of the cores' caches (8.3 ms an image at 4, 9.4 at 16)

    @property
    def name(self) -> str:
        return onnx_engine_name()

    def run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        output: NDArray[np.float32] = self.session.run(None, {INPUT_NAME: images})[0]
        return output


def onnx_engine_name() -> str:
    return f"onnxruntime {onnxruntime.__version__}"


def torch_engine_name(device: Device, autocast: bool) -> str:
    return f"torch {torch.__version__} {device} {'float16' if autocast and device == 'cuda' else 'float32'}"


def open_engine(
    module: PixelPrefix,
    images: NDArray[np.uint8],
    device: Device,
    store: Path,
    graph: GraphSource | None,
    event: EventCallback,
) -> Engine:
    """Return the fastest engine that agrees with torch on `images`, a few real ones.

    Args:
        store: folder in which the exported graph and the verdict on it are kept for later runs.
        graph: where an ONNX file comes from that computes the embedding, if the classifier was exported already; exporting takes
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


def refused(store: Path) -> str | None:
    """Return why ONNX Runtime was found unfit for this prefix before; None if it was not."""
    verdict = store / "engine.json"
    refusal: str | None = read_json(verdict).get("refused") if verdict.exists() else None
    return refusal


class _Disagreement(Exception):
    """An engine whose output is not torch's."""


def _open_onnx(
    module: PixelPrefix, images: NDArray[np.uint8], plain: TorchEngine, store: Path, graph: GraphSource | None
) -> OnnxEngine:
    file, verdict = store / "prefix.onnx", store / "engine.json"
    if file.exists() and verdict.exists() and read_json(verdict).get("sha256") == sha256_file(file):
        return OnnxEngine(open_session(file.read_bytes()))
    model = export_prefix(module) if graph is None else _only_embedding(graph())
    engine = OnnxEngine(open_session(model))
    cosine = agreement(engine.run(images), plain.run(images))
    if not cosine > LEAST_AGREEMENT:
        raise _Disagreement(f"ONNX Runtime's output has a cosine of {cosine:.6f} with PyTorch's, {LEAST_AGREEMENT} is asked for")
    write_atomic(file, lambda stream: stream.write(model))
    write_json(verdict, {"sha256": hashlib.sha256(model).hexdigest(), "cosine": cosine, "images": len(images)})
    return engine


def _open_cuda(module: PixelPrefix, images: NDArray[np.uint8], event: EventCallback) -> TorchEngine:
    on_device = module.to("cuda")
    plain, fast = TorchEngine(on_device, "cuda", autocast=False), TorchEngine(on_device, "cuda", autocast=True)
    cosine = agreement(fast.run(images), plain.run(images))
    if cosine > LEAST_AGREEMENT:
        return fast
    event(
        PrefixEngine(f"the frozen part of {module.backbone_name} runs in float32: float16 has a cosine of {cosine:.6f} with it")
    )
    return plain


def agreement(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Return the least 2ab / (a² + b²) over matching rows: their cosine where they are equally long, less where they are not.

    NaN if anything is not finite.
    """
    a, b = (rows.reshape(len(rows), -1).astype(np.float64) for rows in (first, second))
    squares = (a * a).sum(axis=1) + (b * b).sum(axis=1)
    return float(np.where(squares == 0, 1.0, 2 * (a * b).sum(axis=1) / np.where(squares == 0, 1.0, squares)).min())


def export_prefix(module: PixelPrefix) -> bytes:
    """Return the prefix as one ONNX file: `images` (B, h, w, 3) uint8 in, its activation out."""
    height, width = module.input_size_px
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own insides
        program = torch.onnx.export(
            module,
            (torch.zeros((2, height, width, 3), dtype=torch.uint8),),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=False,
        )
    assert program is not None
    stream = io.BytesIO()
    onnx.save_model(program.model_proto, stream)
    return stream.getvalue()


def _only_embedding(graph: bytes) -> bytes:
    """Return the graph with the embedding as its only output; the session prunes what only served the others."""
    model = onnx.load_model_from_string(graph)
    kept = [output for output in model.graph.output if output.name == OUTPUT_NAME]
    if not kept:
        raise ValueError(f"the graph has no output named {OUTPUT_NAME!r}")
    del model.graph.output[:]
    model.graph.output.extend(kept)
    data: bytes = model.SerializeToString()
    return data


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
