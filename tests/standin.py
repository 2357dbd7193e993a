"""Small whole bundles for tests of what runs them: a linear model on colours, written with the ONNX helpers, no training needed.

The logits are 4 times the mean colour, so any answer can be worked out by hand; the map is 4 times the colour at each position,
so its mean is the logit, as in a real bundle.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from finetune.bundle.calibration import HELD_OUT, Calibration, write_subspace
from finetune.bundle.manifest import DRIFT, MODEL, NOVELTY, SELF_TEST, WEIGHTS, Manifest, write_manifest
from finetune.bundle.predictor import write_self_test
from finetune.bundle.preprocess import Preprocess
from finetune.bundle.weights import METADATA_KEY
from finetune.metrics.novelty import Subspace
from finetune.monitoring.reference import Reference, write_reference

SIDE_PX = 16
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
PREPROCESS = Preprocess((SIDE_PX, SIDE_PX), "crop", 1.0, "bilinear", (0, 0, 0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
WEIGHT = 4.0 * np.eye(3, dtype=np.float32)  # (3 channels, 3 classes)
NO_CAM_REASON = "this stand-in leaves its map out"


def picture(colour: str = "red", size_px: tuple[int, int] = (32, 24), file_format: str = "PNG") -> bytes:
    """One plain image file."""
    stream = io.BytesIO()
    Image.new("RGB", size_px, COLOURS[colour]).save(stream, file_format)
    return stream.getvalue()


def write_bundle(
    folder: Path,
    classes: Sequence[str] = tuple(COLOURS),
    *,
    cam: bool = True,
    name: str = "colours",
    calibration: Calibration | None = None,
    subspace: Subspace | None = None,
    with_weights: bool = False,
    reference: Reference | None = None,
) -> Path:
    """A valid bundle that says ``classes[i]`` for the colour number i; `with_weights`, with a file of weights without tensors."""
    folder.mkdir(parents=True)
    outputs = ("probs", "logits", "cam", "embedding") if cam else ("probs", "logits", "embedding")
    (folder / MODEL).write_bytes(_model(outputs).SerializeToString())
    encoded = [picture(colour) for colour in COLOURS]
    images = np.stack([PREPROCESS.load(data) for data in encoded])
    logits = (images / np.float32(255)).mean(axis=(1, 2)) @ WEIGHT
    write_self_test(folder / SELF_TEST, encoded, images, logits.astype(np.float32))
    if subspace is not None:
        write_subspace(folder / NOVELTY, subspace)
    if reference is not None:
        write_reference(folder / DRIFT, reference)
    if with_weights:
        header = json.dumps({"__metadata__": {METADATA_KEY: json.dumps({"pooling": "avg", "seed": 0})}}).encode()
        (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    write_manifest(
        folder,
        Manifest(
            name=name,
            version=None,
            created_at=time.time(),
            classes=tuple(classes),
            preprocess=PREPROCESS,
            backbone={"name": "stand-in"},
            method={"type": "linear_probe"},
            spec_digest="",
            outputs=outputs,
            calibration={} if calibration is None else {HELD_OUT: calibration.to_dict()},
            cam={"available": cam, "kind": "linear" if cam else None, "reason": "" if cam else NO_CAM_REASON},
        ),
    )
    return folder


def _model(outputs: Sequence[str]) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Cast", ["images"], ["raw"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["raw", "scale"], ["pixels"]),  # (B, h, w, 3) 0..1
        helper.make_node("ReduceMean", ["pixels", "sides"], ["embedding"], keepdims=0),  # (B, 3)
        helper.make_node("MatMul", ["embedding", "weight"], ["logits"]),  # (B, 3)
        helper.make_node("Softmax", ["logits"], ["probs"], axis=1),
    ]
    if "cam" in outputs:
        nodes += [
            helper.make_node("MatMul", ["pixels", "weight"], ["evidence"]),  # (B, h, w, 3)
            helper.make_node("ArgMax", ["logits"], ["top"], axis=1, keepdims=1),  # (B, 1)
            helper.make_node("OneHot", ["top", "depth", "off_on"], ["mask"], axis=-1),  # (B, 1, 3)
            helper.make_node("Unsqueeze", ["mask", "first_side"], ["mask4"]),  # (B, 1, 1, 3)
            helper.make_node("Mul", ["evidence", "mask4"], ["chosen"]),
            helper.make_node("ReduceSum", ["chosen", "last"], ["cam"], keepdims=0),  # (B, h, w)
        ]
    constants = {
        "scale": np.array(255, np.float32),
        "sides": np.array([1, 2], np.int64),
        "weight": WEIGHT,
        "depth": np.array(3, np.int64),
        "off_on": np.array([0, 1], np.float32),
        "first_side": np.array([1], np.int64),
        "last": np.array([3], np.int64),
    }
    shapes = {"probs": ["B", 3], "logits": ["B", 3], "embedding": ["B", 3], "cam": ["B", SIDE_PX, SIDE_PX]}
    graph = helper.make_graph(
        nodes,
        "stand-in",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", SIDE_PX, SIDE_PX, 3])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shapes[output]) for output in outputs],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model
