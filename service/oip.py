"""The Open Inference Protocol, version 2, over HTTP, with the binary extension that ``tritonclient[http]`` uses.

A request describes its tensors in JSON; with the binary extension (``Inference-Header-Content-Length``) their values follow the
JSON as raw bytes. The input ``images`` is either preprocessed pixels (UINT8, N × height × width × 3) or encoded image files
(BYTES, N).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.bundle.image_limits import ImageLimits
from finetune.bundle.predictor import Outputs
from finetune.errors import InvalidInput, Problem
from service.models import LoadedModel

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_BATCH = 64
_INPUT = "images"


@dataclass(frozen=True)
class InferRequest:
    """One inference request: pixels or encoded files, and the requested outputs with their parameters."""

    id: str | None
    pixels: np.ndarray | None  # (N, h, w, 3) uint8
    files: tuple[bytes, ...]
    outputs: Mapping[str, Mapping[str, Any]]  # name → parameters; empty: all
    binary_by_default: bool

    @property
    def n_images(self) -> int:
        """The number of images in the batch."""
        return len(self.files) if self.pixels is None else len(self.pixels)


def server_metadata(version: str) -> dict[str, Any]:
    """Return the metadata of the server."""
    return {"name": "finetune", "version": version, "extensions": ["binary_tensor_data", "classification"]}


def model_metadata(model: LoadedModel, versions: list[str]) -> dict[str, Any]:
    """Return the metadata of a model's inputs and outputs."""
    manifest = model.predictor.manifest
    height, width = manifest.preprocess.input_size_px
    outputs = [{"name": name, "datatype": "FP32", "shape": _output_shape(model, name)} for name in manifest.outputs]
    return {
        "name": model.name,
        "versions": versions,
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": _INPUT, "datatype": "UINT8", "shape": [-1, height, width, 3]}],
        "outputs": outputs,
    }


def _output_shape(model: LoadedModel, name: str) -> list[int]:
    n_classes = len(model.predictor.manifest.classes)
    return [-1, n_classes] if name in ("probs", "logits") else [-1, -1, -1] if name == "cam" else [-1, -1]


def parse_request(body: bytes, header_length: str | None) -> InferRequest:
    """Parse the JSON of a request and its binary tensors.

    Raises:
        InvalidInput: the request is invalid; each problem names its field.
    """
    length = len(body) if header_length is None else _whole_number(header_length)
    try:
        head = json.loads(body[:length])
    except ValueError:
        raise InvalidInput("the request is not JSON (or its Inference-Header-Content-Length is wrong)") from None
    if not isinstance(head, dict) or not isinstance(head.get("inputs"), list) or len(head["inputs"]) != 1:
        raise InvalidInput(
            "a request has exactly one input", [Problem("inputs", f"must be a list with one input, named {_INPUT!r}")]
        )
    given, outputs = head["inputs"][0], head.get("outputs") or []
    if not isinstance(given, dict) or given.get("name") != _INPUT:
        raise InvalidInput(f"the input is named {_INPUT!r}", [Problem("inputs[0].name", f"must be {_INPUT!r}")])
    if not isinstance(outputs, list) or not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in outputs):
        raise InvalidInput(
            "outputs is a list of objects with a name", [Problem("outputs", "must be a list of objects with a name")]
        )
    pixels, files = _tensor(given, body[length:])
    identifier = head.get("id")
    return InferRequest(
        identifier if isinstance(identifier, str) else None,
        pixels,
        files,
        {one["name"]: _parameters(one) for one in outputs},
        bool(_parameters(head).get("binary_data_output")),
    )


def _parameters(given: Mapping[str, Any]) -> Mapping[str, Any]:
    found = given.get("parameters")
    return found if isinstance(found, dict) else {}


def _whole_number(text: str) -> int:
    if not text.isdecimal():
        raise InvalidInput(f"{HEADER_LENGTH} is not a number: {text[:50]!r}")
    return int(text)


def _tensor(given: Mapping[str, Any], binary: bytes) -> tuple[np.ndarray | None, tuple[bytes, ...]]:
    """Return the values of the input, either as pixels or as encoded files."""
    shape, datatype = given.get("shape"), given.get("datatype")
    if not isinstance(shape, list) or not all(
        isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in shape
    ):
        raise InvalidInput("the input has no shape", [Problem("inputs[0].shape", "must be a list of whole numbers above 0")])
    if not shape or shape[0] > MAX_BATCH:
        raise InvalidInput("the batch is too large", [Problem("inputs[0].shape", f"must be at most {MAX_BATCH} images")])
    size = _parameters(given).get("binary_data_size")
    if size is not None and (not isinstance(size, int) or size != len(binary)):
        raise InvalidInput(
            "the binary data is too short or too long", [Problem("inputs[0].parameters", "binary_data_size is not what was sent")]
        )
    if datatype == "UINT8":
        return _pixels(given, shape, binary if size is not None else None), ()
    if datatype == "BYTES":
        return None, _files(given, shape, binary if size is not None else None)
    raise InvalidInput(
        "the input has an unsupported type", [Problem("inputs[0].datatype", "must be UINT8 (pixels) or BYTES (encoded files)")]
    )


def _pixels(given: Mapping[str, Any], shape: list[int], binary: bytes | None) -> np.ndarray:
    try:
        if binary is not None:
            return np.frombuffer(binary, np.uint8).reshape(shape)
        values = np.asarray(given.get("data"))
        if values.dtype.kind not in "iu" or values.size == 0 or values.min() < 0 or values.max() > 255:
            raise ValueError
        return values.astype(np.uint8).reshape(shape)
    except (ValueError, TypeError):
        raise InvalidInput(
            "the pixels do not fit", [Problem("inputs[0].data", f"must be whole numbers 0 to 255 in shape {shape}")]
        ) from None


def _files(given: Mapping[str, Any], shape: list[int], binary: bytes | None) -> tuple[bytes, ...]:
    if len(shape) > 2 or (len(shape) == 2 and shape[1] != 1) or binary is None:
        problem = "must be [N] or [N, 1], with the files as binary data"
        raise InvalidInput("encoded files are sent as binary data", [Problem("inputs[0].shape", problem)])
    found, position = [], 0
    while position < len(binary):
        if position + 4 > len(binary):
            break
        (length,) = struct.unpack_from("<I", binary, position)
        found.append(binary[position + 4 : position + 4 + length])
        position += 4 + length
    if len(found) != shape[0] or position != len(binary):
        raise InvalidInput(
            "the files do not fit", [Problem("inputs[0].data", f"must be {shape[0]} files, each after its length")]
        )
    return tuple(found)


def infer(model: LoadedModel, request: InferRequest, limits: ImageLimits) -> tuple[bytes, int | None, Outputs]:
    """Run one inference; return the response body, the length of its JSON if binary data follows (else None), and the outputs.

    Raises:
        ImageError: an encoded file cannot be read.
        InvalidInput: the pixels do not have the model's input shape, or a requested output does not exist.
    """
    predictor = model.predictor
    wanted = request.outputs or {str(name): {} for name in predictor.manifest.outputs}
    for name in wanted:
        if name not in predictor.manifest.outputs:
            known = ", ".join(predictor.manifest.outputs)
            raise InvalidInput(f"no output {name[:100]!r}", [Problem("outputs", f"{name[:100]!r} is not one of {known}")])
    pixels = request.pixels
    if pixels is None:
        pixels = np.stack([predictor.manifest.preprocess.load(data, limits=limits) for data in request.files])
    found = predictor.run(np.ascontiguousarray(pixels))
    values = {"probs": found.probs, "logits": found.logits, "embedding": found.embedding, "cam": found.cam}
    described, binary = [], b""
    for name, parameters in wanted.items():
        array = values[name]
        assert array is not None  # the manifest lists it
        entry, raw = _output(name, array, parameters, request.binary_by_default, predictor.manifest.classes)
        described.append(entry)
        binary += raw
    head: dict[str, Any] = {"model_name": model.name, "model_version": model.version, "outputs": described}
    if request.id is not None:
        head["id"] = request.id
    encoded = json.dumps(head).encode()
    return encoded + binary, len(encoded) if binary else None, found


def _output(
    name: str, values: np.ndarray, parameters: Mapping[str, Any], binary_by_default: bool, classes: tuple[str, ...]
) -> tuple[dict[str, Any], bytes]:
    """Return an output's JSON and its raw bytes, which are empty if the values are in the JSON."""
    n_classes = parameters.get("classification", 0)
    if isinstance(n_classes, int) and n_classes > 0 and name in ("probs", "logits"):
        order = np.argsort(-values, axis=1, kind="stable")[:, :n_classes]
        texts = [f"{row[index]:f}:{index}:{classes[index]}" for row, best in zip(values, order, strict=True) for index in best]
        raw = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)
        entry: dict[str, Any] = {"name": name, "datatype": "BYTES", "shape": list(order.shape)}
        data: list[Any] = texts
    else:
        raw = np.ascontiguousarray(values, np.float32).tobytes()
        entry, data = {"name": name, "datatype": "FP32", "shape": list(values.shape)}, []
    if parameters.get("binary_data", binary_by_default):
        return {**entry, "parameters": {"binary_data_size": len(raw)}}, raw
    return {**entry, "data": data or values.astype(np.float32).ravel().tolist()}, b""
