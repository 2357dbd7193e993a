"""A small true bundle, made in milliseconds without torch: normalise → conv → global average pool → linear, in ONNX's own terms.

For tests of whatever reads, serves or registers bundles. Weights are random but seeded; everything else is as in a real bundle:
the class activation map's mean plus the bias is the logit, and the self-test passes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from awkward import encoded, turned
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from finetune.bundle.manifest import Manifest, write_manifest
from finetune.bundle.predictor import Seen, write_self_test
from finetune.bundle.preprocess import Preprocess

CLASSES = ("ash", "beech", "cedar", 'Dörrobst & "quotes"', "elm")
PREPROCESS = Preprocess((32, 32), "crop", 0.875, "bicubic", (124, 116, 104), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
N_FEATURES = 8


def weights(n_classes: int = len(CLASSES), seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "kernel": rng.normal(0, 0.5, (N_FEATURES, 3, 3, 3)).astype(np.float32),
        "head": rng.normal(0, 2.0, (n_classes, N_FEATURES)).astype(np.float32),
        "bias": rng.normal(0, 0.5, n_classes).astype(np.float32),
    }


def tiny_model(
    preprocess: Preprocess = PREPROCESS, tensors: dict[str, np.ndarray] | None = None, *, cam: bool = True
) -> onnx.ModelProto:
    """uint8 NHWC images to probs, logits, cam of the top class and embedding."""
    tensors = weights() if tensors is None else tensors
    n_classes = len(tensors["bias"])
    h, w = preprocess.input_size_px
    constants = {
        **tensors,
        "mean_levels": np.float32(255) * np.array(preprocess.mean, np.float32),
        "std_levels": np.float32(255) * np.array(preprocess.std, np.float32),
        "positions": np.array([2, 3], np.int64),
        "channels": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["levels", "mean_levels"], ["centred"]),
        helper.make_node("Div", ["centred", "std_levels"], ["normal"]),
        helper.make_node("Transpose", ["normal"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernel"], ["convolved"], strides=[4, 4]),
        helper.make_node("Relu", ["convolved"], ["maps"]),
        helper.make_node("ReduceMean", ["maps", "positions"], ["embedding"], keepdims=0),
        helper.make_node("Gemm", ["embedding", "head", "bias"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probs"], axis=1),
    ]
    cells = [(side - 3) // 4 + 1 for side in (h, w)]
    outputs = {"probs": ["B", n_classes], "logits": ["B", n_classes], "cam": ["B", *cells], "embedding": ["B", N_FEATURES]}
    if cam:
        nodes += [
            helper.make_node("ArgMax", ["logits"], ["top"], axis=1, keepdims=0),
            helper.make_node("Gather", ["head", "top"], ["top_weights"], axis=0),
            helper.make_node("Unsqueeze", ["top_weights", "positions"], ["top_weights_here"]),
            helper.make_node("Mul", ["maps", "top_weights_here"], ["contributions"]),
            helper.make_node("ReduceSum", ["contributions", "channels"], ["cam"], keepdims=0),
        ]
    else:
        del outputs["cam"]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", h, w, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


_NO_WEIGHTS = {"source": "none", "identifier": "seed 0", "sha256": None, "license": None}


def tiny_manifest(
    *, cam: bool = True, classes: tuple[str, ...] = CLASSES, name: str = "trees", preprocess: Preprocess = PREPROCESS
) -> Manifest:
    return Manifest(
        name=name,
        version=None,
        created_at=1_700_000_000.0,
        classes=classes,
        preprocess=preprocess,
        backbone={"name": "tiny", "weights": _NO_WEIGHTS, "n_parameters": 216},
        method={"type": "linear_probe"},
        spec_digest="0" * 64,
        outputs=("probs", "logits", "cam", "embedding") if cam else ("probs", "logits", "embedding"),
        cam={"available": cam, "kind": "linear" if cam else None, "reason": "" if cam else "left out for this test"},
        metrics={"val/top1": 0.75},
        versions={"onnxruntime": onnxruntime.__version__},
        model={"opset": 18, "exporter": "by hand", "input_name": "images"},
    )


def self_test_files() -> list[bytes]:
    """Three encoded images: a turned JPEG, a textured one, a PNG with alpha."""
    noise = np.random.default_rng(3).integers(0, 256, (12, 16, 3), np.uint8)
    photo = Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC)
    glass = photo.convert("RGBA")
    glass.putalpha(Image.linear_gradient("L").resize(glass.size))
    return [turned(6, "JPEG", quality=95), encoded(photo, "JPEG", quality=90), encoded(glass, "PNG")]


def write_tiny_bundle(
    folder: Path,
    *,
    cam: bool = True,
    seed: int = 0,
    classes: tuple[str, ...] = CLASSES,
    name: str = "trees",
    preprocess: Preprocess = PREPROCESS,
    seen: Seen | None = None,
    **changes: object,
) -> Manifest:
    """Write a bundle that loads; give its manifest back."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = tiny_manifest(cam=cam, classes=classes, name=name, preprocess=preprocess)
    manifest = dataclasses.replace(manifest, **changes)  # type: ignore[arg-type]
    model = tiny_model(preprocess, weights(len(classes), seed), cam=cam)
    helper.set_model_props(model, manifest.model_metadata())
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    files = self_test_files()
    images = np.stack([preprocess.load(data) for data in files])
    write_self_test(folder / "probe.npz", files, images, logits_of(model, images), seen or Seen())
    return write_manifest(folder, manifest)


def logits_of(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(["logits"], {"images": images})[0]
    return logits


def reseal(folder: Path, **changes: object) -> None:
    """Write the manifest anew with `changes` and right checksums, as if the files had been exported so."""
    manifest = Manifest.from_json((folder / "bundle.json").read_bytes())
    write_manifest(folder, dataclasses.replace(manifest, **changes))  # type: ignore[arg-type]
