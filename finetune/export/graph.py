"""A classifier as one ONNX graph: uint8 images in; probabilities, logits, class activation map and embedding out.

The graph is traced once, with every weight as a named input, and then filled with the weights of the moment: first those of the
backbone (`fold`), then the head (`finetune.export.template`). Training changes weights and nothing else, so the graph that proved
exportable before training is the graph that ships after it, and filling it costs a fraction of tracing it. This module knows
torch and ONNX; it does not know images, files or bundles.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import nn

from finetune.bundle.manifest import OutputName
from finetune.errors import ExportError
from finetune.export.template import HEAD_BIAS, HEAD_WEIGHT, INPUT_NAME, OPSET, TEMPERATURE, Head, serialized, with_head
from finetune.model.classifier import Classifier
from finetune.runtime.collector import collection_paused
from finetune.training.objectives import objective_of

EXPORTER = f"torch.onnx dynamo, torch {torch.__version__}"

_OF_HEAD = (HEAD_WEIGHT, HEAD_BIAS, TEMPERATURE)
_TRACE_BATCH = 2  # with 1 the exporter takes the batch for a constant
_LARGEST_FILE_BYTES = 2**31 - 1  # what one protobuf message, and so one ONNX file without external data, can hold


class DeployModule(nn.Module):
    """What the ONNX graph computes, as a module: a classifier from uint8 pixels to the probabilities of its task.

    `temperature` divides the logits before the softmax (calibration); it moves probabilities, never the order of classes.
    """

    temperature: torch.Tensor

    def __init__(self, classifier: Classifier, temperature: float = 1.0, task: str = "multiclass") -> None:
        super().__init__()
        self.objective = objective_of(task)
        self.classifier = classifier
        device = next(classifier.parameters()).device
        self.register_buffer("temperature", torch.tensor(temperature, dtype=torch.float32, device=device), persistent=False)

    @property
    def outputs(self) -> tuple[OutputName, ...]:
        return ("probs", "logits", "cam", "embedding") if self.classifier.cam_kind else ("probs", "logits", "embedding")

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, h, w, 3) uint8 → probs (B, C), logits (B, C), cam (B, h', w') of the top class, if any, and embedding (B, D)."""
        logits, embedding, cam = self.classifier.explain(self.classifier.normalise(images))
        probs = self.objective.probabilities(logits / self.temperature)
        return (probs, logits, embedding) if cam is None else (probs, logits, cam, embedding)


@dataclass(frozen=True)
class Graph:
    """A traced `DeployModule` without its weights: `proto` is an ONNX model that takes them as inputs, named as in the module."""

    proto: bytes = field(repr=False)
    outputs: tuple[OutputName, ...]


def trace(module: DeployModule) -> Graph:
    """Trace a copy of `module` in eval mode; nothing in `module` changes, not even what its layers cache.

    Raises:
        ExportError: ONNX cannot express it; the message names the backbone and the operator.
    """
    name = module.classifier.backbone.name
    _refuse_too_large(module, name)
    height, width = module.classifier.backbone.preprocess.input_size_px
    images = torch.zeros((_TRACE_BATCH, height, width, 3), dtype=torch.uint8, device=module.temperature.device)
    copied = copy.deepcopy(module)
    _work_out_of_place(copied)
    try:
        program = _exported(copied, images)
    except torch.onnx.errors.OnnxExporterError as error:
        if not _unfuse_attention(copied):
            raise ExportError(_why(name, error)) from error
        try:
            program = _exported(copied, images)
        except torch.onnx.errors.OnnxExporterError:
            raise ExportError(_why(name, error)) from error
    return Graph(_weights_as_inputs(program.model, module), module.outputs)


def _exported(module: DeployModule, images: torch.Tensor) -> torch.onnx.ONNXProgram:
    with evaluating(module), torch.no_grad(), collection_paused(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own insides
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=list(module.outputs),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
    assert program is not None
    return program


def fold(graph: Graph, module: DeployModule) -> bytes:
    """Return the graph with the present weights of the backbone, batch norms folded, as a template for any head.

    Equal weights give equal bytes.
    """
    model = ir.from_proto(onnx.load_model_from_string(graph.proto))
    weights = {name: weight for name, weight in named_weights(module).items() if name not in _OF_HEAD}
    for value in [value for value in model.graph.inputs if value.name in weights]:
        array = weights[str(value.name)].detach().cpu().contiguous().numpy()
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    return serialized(ir.to_proto(optimizer.optimize(model)))


def fill(graph: Graph, module: DeployModule) -> bytes:
    """Return the graph with all present weights of `module` as one ONNX file."""
    return with_head(fold(graph, module), head_of(module.classifier), module.temperature.item())


def head_of(classifier: Classifier) -> Head:
    """Return the present head of a classifier."""
    return Head(*(parameter.detach().cpu().numpy() for parameter in (classifier.head.weight, classifier.head.bias)))


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every training flag as it was, whatever rules the module has about `.train()`."""
    flags = [(part, part.training) for part in module.modules()]
    module.train()  # some attention layers cache in eval mode what they make of their weights, and only this drops it
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def named_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, also those that a state dict leaves out, under every name that they have."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _work_out_of_place(module: nn.Module) -> None:
    """An activation that overwrites its input computes the same otherwise, and the exporter takes it apart at great length.

    For the default backbone that is a third of the tracing: 5.0 s of CPU instead of 7.3.
    """
    for part in module.modules():
        if getattr(part, "inplace", False) is True:
            part.inplace = False  # type: ignore[assignment]  # a plain attribute of activations and dropout


def _unfuse_attention(module: nn.Module) -> bool:
    """Write attention out as products and a softmax; return whether there was any to change.

    The exporter takes torch's fused attention on 4 dimensions only. HieRa, NesT, SAM and Twins attend inside windows, which are a
    fifth dimension. Everything else keeps the fused form, which becomes fewer operators.
    """
    fused = [part for part in module.modules() if getattr(part, "fused_attn", False) is True]
    for part in fused:
        part.fused_attn = False  # type: ignore[assignment]  # timm's plain attribute
    return bool(fused)


def _weights_as_inputs(model: ir.Model, module: nn.Module) -> bytes:
    weights = named_weights(module)
    for name in [name for name in model.graph.initializers if name in weights]:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    _forget_origins(model)
    return serialized(ir.to_proto(model))


def _forget_origins(model: ir.Model) -> None:
    """Drop what the exporter writes at each node about the source it came from: bulk, and paths of this machine."""
    model.graph.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _refuse_too_large(module: nn.Module, name: str) -> None:
    n_bytes = sum(weight.numel() * weight.element_size() for weight in named_weights(module).values())
    if n_bytes > _LARGEST_FILE_BYTES:
        raise ExportError(
            f"{name} has {n_bytes / 2**30:.1f} GiB of weights, and one ONNX file without external data holds 2 GiB at most: "
            "choose a smaller variant of it"
        )


def _why(name: str, error: BaseException) -> str:
    """One sentence out of the exporter's pages: the operator that has no counterpart, or else the innermost cause."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    operator = re.search(r"OpOverload\(op='([^']+)'", str(cause))
    if operator:
        return f"{name} cannot be exported: ONNX has no counterpart for its operator {operator[1]}; choose another backbone"
    first_line = str(cause).strip().partition("\n")[0]
    return f"{name} cannot be exported: its forward pass cannot be traced ({first_line}); choose another backbone"
