"""Try the export before training, with the initial weights, so that a network that ONNX cannot express fails within seconds."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

import finetune.export.graph as graph_code
import finetune.model.backbone as backbone_code
import finetune.model.classifier as classifier_code
from finetune.errors import ExportError
from finetune.export.graph import DeployModule, Graph, evaluating, fill, head_of, named_weights, trace
from finetune.model.classifier import Classifier
from finetune.runtime.memory import memory_errors_named
from finetune.runtime.session import INPUT_NAME, ORT_ERRORS, open_session
from finetune.storage.files import write_atomic

_BATCH_SIZES = (1, 3)  # both differ from the batch size that is traced
_TOLERANCE = 1e-3  # relative to the largest value of an output; wide, because noise in random weights amplifies rounding


def dry_run_export(classifier: Classifier, task: str = "multiclass", cache: Path | None = None) -> Graph:
    """Trace `classifier`, run the graph on noise images, compare it with torch, and return it; it is filled after training.

    Args:
        cache: a folder of graphs. A graph of the same architecture is reused, which saves most of the time; if it has been
            compared with the same backbone weights before, it is not compared again.

    Raises:
        ExportError: the backbone cannot be expressed in ONNX or run by ONNX Runtime, or the outputs differ.
        OutOfMemory: there is not enough memory to find out.
    """
    with memory_errors_named(
        f"{classifier.backbone.name} cannot be exported here: there is not enough memory for it; choose a smaller backbone, or a "
        "machine with more memory"
    ):
        return _cached(DeployModule(classifier, task=task), cache)


def _cached(module: DeployModule, cache: Path | None) -> Graph:
    """Return the graph of a module, from the cache if it is there."""
    if cache is None:
        return _traced(module)
    of_layers = fingerprint(module)
    file, compared = cache / f"{of_layers}.onnx", cache / f"{of_layers}-{_weights_digest(module.classifier)}.compared"
    if file.is_file():
        graph = Graph(file.read_bytes(), module.outputs)
        if compared.is_file() and compared.read_text() == hashlib.sha256(graph.proto).hexdigest():
            return graph
        with contextlib.suppress(ExportError):  # the graph differs in a way that the fingerprint does not cover: trace again
            _check(graph, module)
            _record_comparison(compared, graph)
            return graph
    graph = _traced(module)
    write_atomic(file, lambda stream: stream.write(graph.proto))
    _record_comparison(compared, graph)
    return graph


def _traced(module: DeployModule) -> Graph:
    graph = trace(module)
    _check(graph, module)
    return graph


def _record_comparison(compared: Path, graph: Graph) -> None:
    digest = hashlib.sha256(graph.proto).hexdigest()
    write_atomic(compared, lambda stream: stream.write(digest.encode()))


def _weights_digest(classifier: Classifier) -> str:
    """Return the sha256 of the backbone's weights, without the head, which every run initialises anew."""
    digest = hashlib.sha256()
    for name, weight in sorted(named_weights(classifier.backbone).items()):
        digest.update(f"{name}\n".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(module: DeployModule) -> str:
    """Return the sha256 of everything that the graph depends on except weights: layers, their sizes, and the code that traces.

    The head is left out, because the graph is the same for every number of classes, and auxiliary heads, which are not exported.
    """
    classifier, backbone = module.classifier, module.classifier.backbone
    sizes = [(name, tuple(weight.shape), weight.dtype) for name, weight in named_weights(backbone).items()]
    layers = (repr(backbone), sizes)
    around = (
        module.objective.task,
        backbone.name,
        backbone.preprocess.input_size_px,
        backbone.feature_format,
        backbone.readout,
        classifier.pooling,
    )
    libraries = [importlib.metadata.version(name) for name in ("torch", "timm", "onnx", "onnxscript")]
    code = [inspect.getsource(source) for source in (graph_code, classifier_code, backbone_code)]
    return hashlib.sha256(repr([layers, around, libraries, code]).encode()).hexdigest()


def _check(graph: Graph, module: DeployModule) -> None:
    """Run the graph on noise images and compare it with torch.

    Raises:
        ExportError: ONNX Runtime refuses the graph, or an output differs.
    """
    name = module.classifier.backbone.name
    model = fill(graph, module)
    try:
        onnx.checker.check_model(model, full_check=True)
        session = open_session(model)
        for batch in _BATCH_SIZES:
            images = noise(batch, module.classifier.backbone.preprocess.input_size_px)
            computed = session.run(list(graph.outputs), {INPUT_NAME: images})
            compare(name, graph.outputs, _torch_outputs(module, images), computed, head_of(module.classifier).weight)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, *ORT_ERRORS) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"{name} cannot be served: ONNX Runtime refuses its graph ({reason}); choose another backbone"
        ) from error


def noise(batch: int, size_px: tuple[int, int]) -> np.ndarray:
    """Return random images (batch, h, w, 3) uint8, the same in every call."""
    return np.random.default_rng(batch).integers(0, 256, (batch, *size_px, 3), dtype=np.uint8)


def _torch_outputs(module: DeployModule, images: np.ndarray) -> list[np.ndarray]:
    with evaluating(module), torch.no_grad():
        outputs = module(torch.from_numpy(images).to(module.temperature.device))
    return [output.cpu().numpy() for output in outputs]


def compare(
    name: str, outputs: Sequence[str], expected: list[np.ndarray], computed: list[np.ndarray], head_weight: np.ndarray
) -> None:
    """Compare the outputs of ONNX Runtime with torch's.

    A map is a product of features and the head's weights (C, D), whose large terms of both signs cancel: its rounding errors are
    relative to the product of their norms, and not to what is left.

    Raises:
        ExportError: an output has another shape or other values.
    """
    same_class = expected[outputs.index("logits")].argmax(1) == computed[outputs.index("logits")].argmax(1)
    for output, wanted, given in zip(outputs, expected, computed, strict=True):
        if wanted.shape != given.shape:
            raise ExportError(
                f"{name} cannot be exported: at a batch of {len(wanted)} its {output} has the shape {given.shape} in ONNX "
                f"Runtime and {wanted.shape} in torch, so a size was traced as a constant; choose another backbone"
            )
        if output == "cam":  # comparable only where the top class is the same; with noise images, ties are likely
            wanted, given = wanted[same_class], given[same_class]
        difference = np.abs(wanted - given).max(initial=0.0)
        scale = max(1.0, np.abs(wanted).max(initial=0.0))
        if output == "cam":
            largest = np.abs(expected[outputs.index("embedding")]).max(initial=0.0)
            scale = max(scale, largest * np.linalg.norm(head_weight, axis=1).max())
        if not difference <= _TOLERANCE * scale:
            raise ExportError(
                f"{name} cannot be exported: its {output} differs by {difference:.2g} between ONNX Runtime and torch; "
                "choose another backbone"
            )
