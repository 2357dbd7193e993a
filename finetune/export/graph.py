"""Trace a classifier as an ONNX graph, from uint8 images to probabilities, logits, class activation map and embedding.

The graph is traced once, with every weight as a named input, and filled with weights later: first with those of the backbone
(`fold`), then with the head (`finetune.export.template`). Training changes only weights, so the graph that was traced and checked
before training is exported after it, and filling it takes a fraction of the time of tracing. It does not depend on the number of
classes either, so a backbone is traced once for all datasets.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import nn

from finetune.bundle.manifest import OutputName
from finetune.errors import ExportError
from finetune.export.template import CLASSES, HEAD_BIAS, HEAD_WEIGHT, TEMPERATURE, Head, serialized, with_head
from finetune.model.classifier import Classifier
from finetune.model.onnx_program import onnx_program
from finetune.runtime.collector import collection_paused
from finetune.training.objectives import objective_of

EXPORTER = f"torch.onnx dynamo, torch {torch.__version__}"

_OF_HEAD = (HEAD_WEIGHT, HEAD_BIAS, TEMPERATURE)
_TRACED_CLASSES = 3  # of the head that is traced, which stands for any other; 1 and 2 might be broadcast or taken for the batch
_LARGEST_FILE_BYTES = 2**31 - 1  # the limit of a protobuf message, and so of an ONNX file without external data


class DeployModule(nn.Module):
    """The module that is exported: a classifier from uint8 pixels to the probabilities of its task.

    The logits are divided by `temperature` before the link function (calibration), which does not change the order of the
    classes.
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
        """The names of the outputs, in order; cam only if the classifier has an exact one."""
        return ("probs", "logits", "cam", "embedding") if self.classifier.cam_kind else ("probs", "logits", "embedding")

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs for images (B, h, w, 3) uint8, in the order of `outputs`.

        These are probs (B, C), logits (B, C), cam (B, h', w') of the top class if the classifier has an exact one, and embedding
        (B, D).
        """
        logits, embedding, cam = self.classifier.explain(self.classifier.normalise(images))
        probs = self.objective.probabilities(logits / self.temperature)
        return (probs, logits, embedding) if cam is None else (probs, logits, cam, embedding)


@dataclass(frozen=True)
class Graph:
    """A traced `DeployModule` for any number of classes, without weights, which are inputs of `proto`, named as in the module."""

    proto: bytes = field(repr=False)
    outputs: tuple[OutputName, ...]


def trace(module: DeployModule) -> Graph:
    """Trace a copy of `module` in eval mode; `module` itself does not change.

    Raises:
        ExportError: the module cannot be expressed in ONNX, or is too large; the message names the backbone and the reason.
    """
    name = module.classifier.backbone.name
    _refuse_too_large(module, name)
    copied = copy.deepcopy(module)
    head = copied.classifier.head
    copied.classifier.head = nn.Linear(head.in_features, _TRACED_CLASSES, device=head.weight.device)
    _disable_in_place(copied)
    try:
        program = _exported(copied)
    except torch.onnx.errors.OnnxExporterError as error:
        if not _unfuse_attention(copied):
            raise ExportError(_reason(name, error)) from error
        try:
            program = _exported(copied)
        except torch.onnx.errors.OnnxExporterError:
            raise ExportError(_reason(name, error)) from error
    return Graph(_weights_as_inputs(program.model, module), module.outputs)


def _exported(module: DeployModule) -> torch.onnx.ONNXProgram:
    size = module.classifier.backbone.preprocess.input_size_px
    with evaluating(module), collection_paused():
        return onnx_program(module, size, module.outputs, device=module.temperature.device, optimize=False)


def fold(graph: Graph, module: DeployModule) -> bytes:
    """Return the graph with the current weights of the backbone, as a template for any head; batch norms are folded.

    Equal weights give equal bytes.
    """
    model = ir.from_proto(onnx.load_model_from_string(graph.proto))
    weights = {name: weight for name, weight in named_weights(module).items() if name not in _OF_HEAD}
    for value in [value for value in model.graph.inputs if value.name in weights]:
        array = weights[str(value.name)].detach().cpu().contiguous().numpy()
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    return serialized(ir.to_proto(optimized(model)))


def optimized(model: ir.Model) -> ir.Model:
    """Return the model after onnxscript's optimizer, with the constants that it loses.

    It turns minimum and maximum into a clip and names the bounds after the value that is clipped. If a value is clipped twice,
    only one pair of bounds stays in the graph.
    """
    model = optimizer.optimize(model)
    graph = model.graph
    read = (value for node in graph for value in node.inputs if value is not None)
    constants = {id(value): value for value in read if value.const_value is not None and value.producer() is None}
    taken = {str(value.name) for value in (*constants.values(), *graph.initializers.values())}
    for value in constants.values():
        if graph.initializers.get(str(value.name)) is not value:
            value.name = next(name for number in itertools.count(1) if (name := f"{value.name}.{number}") not in taken)
            taken.add(value.name)
            graph.register_initializer(value)
    return model


def fill(graph: Graph, module: DeployModule) -> bytes:
    """Return the graph with all current weights of `module` as one ONNX file."""
    return with_head(fold(graph, module), head_of(module.classifier), module.temperature.item())


def head_of(classifier: Classifier) -> Head:
    """Return a copy of the current head of a classifier."""
    return Head(*(parameter.detach().cpu().numpy() for parameter in (classifier.head.weight, classifier.head.bias)))


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module into eval mode for the block, and restore the training flag of each of its parts afterwards."""
    flags = [(part, part.training) for part in module.modules()]
    module.train()  # clears what some attention layers compute from their weights in eval mode and cache
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def named_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers, non-persistent ones included, under every name that they have."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def _disable_in_place(module: nn.Module) -> None:
    """Switch off in-place activations, which compute the same but take the exporter longer to decompose.

    For the default backbone, tracing takes 5.0 s of CPU time instead of 7.3 s.
    """
    for part in module.modules():
        if getattr(part, "inplace", False) is True:
            part.inplace = False  # type: ignore[assignment]  # a plain attribute of activations and dropout


def _unfuse_attention(module: nn.Module) -> bool:
    """Make attention layers compute products and a softmax instead of torch's fused attention; return False if there are none.

    The exporter supports fused attention on 4 dimensions only, and HieRa, NesT, SAM and Twins have the windows as a fifth. Other
    networks keep the fused form, which is exported as fewer operators.
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
    _generalise_classes(model.graph)
    _remove_source_notes(model)
    return serialized(ir.to_proto(model))


def _generalise_classes(graph: ir.Graph) -> None:
    """Make the number of classes the dimension `CLASSES`, and forget the shapes of intermediate values that depend on it."""
    of_head = {value for value in graph.inputs if value.name in (HEAD_WEIGHT, HEAD_BIAS)}
    for value in of_head:
        assert value.shape is not None, f"{value.name} was traced without a shape"
        value.shape = ir.Shape([CLASSES, *value.shape[1:]])
    reached = set(of_head)
    for node in graph.all_nodes():  # each after those that it reads from
        if any(value in reached for value in node.inputs):
            reached.update(node.outputs)
    for value in reached - of_head:
        value.shape = None
    for value in graph.outputs:
        if value.name in ("probs", "logits"):
            value.shape = ir.Shape(["batch", CLASSES])


def _remove_source_notes(model: ir.Model) -> None:
    """Remove the exporter's notes about source code from each node: they are large, and contain paths of this machine."""
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


def _reason(name: str, error: BaseException) -> str:
    """Return one sentence about the exporter's error: the operator that ONNX does not have, else the innermost cause."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    operator = re.search(r"OpOverload\(op='([^']+)'", str(cause))
    if operator:
        return f"{name} cannot be exported: ONNX has no counterpart for its operator {operator[1]}; choose another backbone"
    first_line = str(cause).strip().partition("\n")[0]
    return f"{name} cannot be exported: its forward pass cannot be traced ({first_line}); choose another backbone"
