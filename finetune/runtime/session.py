"""Open ONNX Runtime sessions. Their options are chosen only here.

Operators are executed one after another, each on `threads` cores. Idle threads do not spin, because spinning takes CPU time from
decoding and from other sessions. All graph optimisations are enabled: ONNX Runtime's blocked convolution layout (NCHWc), which is
much faster on a CPU, is only used then.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
"""The exceptions that ONNX Runtime raises when it refuses a graph or fails to run it."""

INPUT_NAME = "images"  # of every exported graph
OPSET = 20  # the first with Gelu; supported by ONNX Runtime from 1.17 on

_FATAL_ONLY = 3  # ONNX Runtime's log level; its warnings about its own optimisations are of no use to the user


def open_session(
    model: bytes, *, threads: int = 1, providers: Sequence[str] = ("CPUExecutionProvider",)
) -> onnxruntime.InferenceSession:
    """Open a session on a serialised ONNX model that runs on `threads` cores.

    Raises:
        One of `ORT_ERRORS`: ONNX Runtime cannot open this model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=list(providers))
