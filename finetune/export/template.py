"""Templates: ONNX models in which the head's weight and bias and the temperature are inputs instead of constants. Torch-free.

All other weights are folded when the template is made. Because these three are inputs, no optimisation has merged them into other
constants, and `with_head` can set them later without torch. The number of classes is the dimension `CLASSES`, which has no value
before the head is set, so one template serves every dataset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

HEAD_WEIGHT, HEAD_BIAS, TEMPERATURE = "classifier.head.weight", "classifier.head.bias", "temperature"
CLASSES = "classes"  # the name of the dimension of logits and probabilities


@dataclass(frozen=True)
class Head:
    """The linear layer of a classifier."""

    weight: NDArray[np.float32]  # (C, D)
    bias: NDArray[np.float32]  # (C,)


def with_head(template: bytes, head: Head, temperature: float = 1.0) -> bytes:
    """Return the template with this head and temperature as constants; equal values give equal bytes.

    Raises:
        ValueError: the model is not a template.
    """
    model = onnx.load_model_from_string(template)
    values = {HEAD_WEIGHT: head.weight, HEAD_BIAS: head.bias, TEMPERATURE: np.array(temperature)}
    if missing := values.keys() - {value.name for value in model.graph.input}:
        raise ValueError(f"the template lacks the inputs {sorted(missing)}")
    kept = [value for value in model.graph.input if value.name not in values]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    if temperature == 1.0:
        del values[TEMPERATURE]
        _remove_division(model.graph)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in values.items())
    _set_classes(model.graph, len(head.bias))
    return serialized(model)


def with_metadata(model: bytes, metadata: Mapping[str, str]) -> bytes:
    """Return the same ONNX file with `metadata` as its ``metadata_props``."""
    proto = onnx.load_model_from_string(model)
    onnx.helper.set_model_props(proto, dict(metadata))
    return serialized(proto)


def _remove_division(graph: onnx.GraphProto) -> None:
    """Remove the division of the logits by the temperature, which changes nothing at a temperature of 1."""
    (division,) = [node for node in graph.node if TEMPERATURE in node.input]
    logits, quotient = division.input[0], division.output[0]
    graph.node.remove(division)
    for node in graph.node:
        node.input[:] = [logits if name == quotient else name for name in node.input]


def _set_classes(graph: onnx.GraphProto, n_classes: int) -> None:
    """Give the dimension `CLASSES` its value."""
    for value in [*graph.output, *graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == CLASSES:
                dim.dim_value = n_classes


def serialized(model: onnx.ModelProto) -> bytes:
    """Return a model as bytes; equal models give equal bytes."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data
