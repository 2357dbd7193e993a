"""Load a bundle, verify it, and predict labels and class activation maps with ONNX Runtime.

Loading verifies all checksums and then runs the self-test: the bundle contains images with the pixels and logits that they must
give. Pixels and logits are checked separately, which tells a wrong model from wrong decoding or preprocessing. Needs only
onnxruntime, numpy and Pillow.
"""

from __future__ import annotations

import hashlib
import io
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime

from finetune.bundle.calibration import (
    NO_CERTAINTY,
    NO_OPTIONS,
    Calibration,
    Certainty,
    CertaintyEstimator,
    CertaintyOptions,
    parse_subspace,
)
from finetune.bundle.image_limits import DEFAULT_LIMITS, ImageLimits
from finetune.bundle.manifest import MANIFEST, MODEL, NOVELTY, SELF_TEST, WEIGHTS, Manifest, metadata_problems, read_manifest
from finetune.bundle.preprocess import Preprocess
from finetune.errors import BundleError, ImageError, InvalidInput, Problem
from finetune.metrics.novelty import Subspace
from finetune.runtime.session import ORT_ERRORS, open_session
from finetune.storage.files import write_atomic
from finetune.tasks import task_named

SEEN_BYTES = 8  # of a sha256; the probability that two of a million files share them is 1 in 37 million

# Processors and builds of the JPEG decoder differ in the last bit. A wrong weight, filter, orientation or channel order causes
# much larger differences: tests/unit/test_bundle_predictor.py shows what each of them does to the self-test.
LOGITS_TOLERANCE = 1e-3  # relative to the largest logit, absolute if that is below 1
PIXELS_TOLERANCE = 0.25  # grey levels, mean over an image

_MODEL_SELF_TEST = "model self-test (arrays → logits)"

# The key of external data in a serialised tensor (tag 1, length 8). ONNX Runtime would read the file that it names.
_EXTERNAL_DATA = b"\x0a\x08location"


Provider = Literal["cpu", "cuda", "coreml", "openvino"]
PROVIDERS: dict[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}


@dataclass(frozen=True)
class Outputs:
    """The outputs of the model for a batch."""

    probs: np.ndarray  # (B, C) float32
    logits: np.ndarray  # (B, C) float32
    embedding: np.ndarray  # (B, D) float32
    cam: np.ndarray | None  # (B, h', w') float32 of the top class; None if the model has none (the manifest says why)


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image."""

    labels: tuple[tuple[str, float], ...]  # (class, probability), most probable first
    cam: np.ndarray | None  # (h', w') float32 of the first label: its mean over positions, plus the bias, is the logit
    image: np.ndarray  # (h, w, 3) uint8, the input of the model
    probs: np.ndarray  # (C,) float32
    embedding: np.ndarray  # (D,) float32
    name: str
    version: str | None
    decode_seconds: float = 0.0
    preprocess_seconds: float = 0.0
    run_seconds: float = 0.0  # the model
    certainty: Certainty = NO_CERTAINTY  # the parts that were asked for
    several: SeveralLabels | None = None  # where each label has a threshold of its own


@dataclass(frozen=True)
class SeveralLabels:
    """The prediction for one image where each label has a threshold of its own."""

    given: tuple[str, ...]  # labels whose probability reaches their threshold, the most probable first
    scores: Mapping[str, float]  # the probability of each class
    thresholds: Mapping[str, float]  # the probability from which on each class is predicted

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as JSON values, under the keys of ``/predict``."""
        return {"labels": list(self.given), "scores": dict(self.scores), "thresholds": dict(self.thresholds)}


@dataclass(frozen=True)
class SelfTest:
    """Images in a bundle with the results that they must give: files, their preprocessed pixels, and the logits of these."""

    encoded: tuple[bytes, ...]  # N files
    images: np.ndarray  # (N, h, w, 3) uint8
    logits: np.ndarray  # (N, C) float32


class Predictor:
    """A verified bundle that predicts images. It can be shared between threads, because `run` has no state."""

    def __init__(
        self,
        manifest: Manifest,
        session: onnxruntime.InferenceSession,
        *,
        model_bytes: int = 0,
        subspace: Subspace | None = None,
    ) -> None:
        self.manifest = manifest
        self.task = task_named(manifest.task)
        self.estimator = CertaintyEstimator(
            manifest.classes,
            Calibration.of(manifest.calibration),
            subspace,
            manifest.abstain.get("precision"),
            unavailable=self.task.why_no_prediction_sets,
        )
        self.model_bytes = model_bytes  # the size of model.onnx, about the memory that the session needs
        self._session = session

    @classmethod
    def load(cls, folder: Path, *, threads: int = 1, provider: Provider = "cpu") -> Predictor:
        """Verify the bundle in `folder` and open its model.

        Args:
            threads: that each call of `run` uses.
            provider: on another one than the CPU, the self-test compares its logits with those that the CPU gave at export.

        Raises:
            BundleError: a file is missing or was changed, the model cannot be opened or does not fit the manifest, or the
                self-test fails; the message says which.
        """
        manifest = read_manifest(folder)
        contents = _verified_contents(folder, manifest)
        session = _open_session(folder, contents[MODEL], threads, provider)
        _check_signature(folder, manifest, session)
        subspace = parse_subspace(folder, contents[NOVELTY]) if NOVELTY in contents else None
        predictor = cls(manifest, session, model_bytes=len(contents[MODEL]), subspace=subspace)
        _check_self_test(folder, predictor, _parse_self_test(folder, contents[SELF_TEST]))
        return predictor

    def run(self, images: np.ndarray) -> Outputs:
        """Return all outputs for preprocessed images (B, h, w, 3) uint8, B >= 1.

        Raises:
            InvalidInput: the images have another shape or type.
        """
        expected = (*self.manifest.preprocess.input_size_px, 3)
        if images.dtype != np.uint8 or images.shape[1:] != expected or not len(images):
            raise InvalidInput(f"the model takes (B, {', '.join(map(str, expected))}) uint8, given {images.shape} {images.dtype}")
        names = self.manifest.outputs
        values = dict(zip(names, self._session.run(list(names), {self.manifest.model["input_name"]: images}), strict=True))
        return Outputs(values["probs"], values["logits"], values["embedding"], values.get("cam"))

    def several_labels(self, probs: np.ndarray) -> SeveralLabels | None:
        """Return the labels that are given to one image by its probabilities (C,); None for a task without thresholds."""
        classes, thresholds = self.manifest.classes, self.manifest.label_thresholds
        if thresholds is None:
            return None
        return SeveralLabels(
            tuple(classes[label] for label in self.task.predict_labels(probs, thresholds)),
            {name: float(value) for name, value in zip(classes, probs, strict=True)},
            dict(zip(classes, thresholds, strict=True)),
        )

    def predict(
        self, data: bytes, top_k: int = 5, *, limits: ImageLimits = DEFAULT_LIMITS, options: CertaintyOptions = NO_OPTIONS
    ) -> Prediction:
        """Predict one encoded image.

        Args:
            top_k: number of most probable classes to return, at most all.
            options: whether to return a prediction set, and whether to abstain.

        Raises:
            ImageError: the bytes are not an image that can be decoded within `limits`.
            InvalidInput: `top_k` is below 1, or the bundle's held-out images are too few for `options`.
        """
        if top_k < 1:
            raise InvalidInput(f"top_k must be at least 1, given {top_k}")
        options = self.estimator.resolved(options)
        began = time.perf_counter()
        decoded = self.manifest.preprocess.decode(data, limits=limits)
        resampled_from = time.perf_counter()
        image = self.manifest.preprocess.resample(*decoded)
        loaded = time.perf_counter()
        outputs = self.run(image[None])
        ran = time.perf_counter()
        probs = outputs.probs[0]
        order = self.task.ranking(probs)[:top_k]
        labels = tuple((self.manifest.classes[index], float(probs[index])) for index in order)
        cam = None if outputs.cam is None else outputs.cam[0]
        return Prediction(
            labels,
            cam,
            image,
            probs,
            outputs.embedding[0],
            self.manifest.name,
            self.manifest.version,
            resampled_from - began,
            loaded - resampled_from,
            ran - loaded,
            self.estimator.estimate(probs, outputs.embedding[0], options),
            self.several_labels(probs),
        )


@dataclass(frozen=True)
class Seen:
    """The images that a model was trained and chosen on, by the first `SEEN_BYTES` bytes of the sha256 of each file."""

    train: frozenset[bytes] = frozenset()
    val: frozenset[bytes] = frozenset()

    @classmethod
    def of(cls, train: Sequence[str], val: Sequence[str]) -> Seen:
        """Return the images with these hexadecimal sha256 digests; empty strings are skipped."""
        return cls(*(frozenset(bytes.fromhex(digest)[:SEEN_BYTES] for digest in digests if digest) for digests in (train, val)))

    def trained_on(self, sha256: str) -> bool:
        """Return whether the file with this digest was in train."""
        return bytes.fromhex(sha256)[:SEEN_BYTES] in self.train

    def chosen_on(self, sha256: str) -> bool:
        """Return whether the file with this digest was in val, which weights and hyperparameters are chosen on."""
        return bytes.fromhex(sha256)[:SEEN_BYTES] in self.val


def write_self_test(path: Path, encoded: Sequence[bytes], images: np.ndarray, logits: np.ndarray, seen: Seen = Seen()) -> None:
    """Write the self-test of a bundle, and the images that the model was trained and chosen on, as arrays without pickle.

    Args:
        encoded, images, logits: of the self-test: N files, (N, h, w, 3) uint8, (N, C) float32.
    """
    arrays: dict[str, Any] = {
        "lengths": np.array([len(data) for data in encoded], np.int64),
        "encoded": np.frombuffer(b"".join(encoded), np.uint8),
        "images": images,
        "logits": logits,
        "seen_train": _as_rows(seen.train),
        "seen_val": _as_rows(seen.val),
    }
    write_atomic(path, lambda stream: np.savez(stream, allow_pickle=False, **arrays))


def read_seen(folder: Path) -> Seen | None:
    """Return the images that the model of the bundle in `folder` was trained and chosen on; None for bundles without them."""
    with np.load(folder / SELF_TEST, allow_pickle=False) as arrays:
        if "seen_train" not in arrays:
            return None
        return Seen(*(frozenset(row.tobytes() for row in arrays[name]) for name in ("seen_train", "seen_val")))


def _as_rows(digests: frozenset[bytes]) -> np.ndarray:
    """Return digests as (N, SEEN_BYTES) uint8, sorted, so that equal sets give equal files."""
    return np.frombuffer(b"".join(sorted(digests)), np.uint8).reshape(-1, SEEN_BYTES)


def read_self_test(path: Path) -> SelfTest:
    """Return the self-test in a file that `write_self_test` wrote.

    Raises:
        BundleError: the file holds no self-test.
    """
    return _parse_self_test(path.parent, path.read_bytes())


def _parse_self_test(folder: Path, data: bytes) -> SelfTest:
    """Parse the content of a self-test file; errors name `folder`."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            ends = np.cumsum(arrays["lengths"])
            joined = arrays["encoded"].tobytes()
            encoded = tuple(joined[end - length : end] for length, end in zip(arrays["lengths"], ends, strict=True))
            known = SelfTest(encoded, arrays["images"], arrays["logits"])
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(f"{folder}: {SELF_TEST} cannot be read: {error}. Export the bundle again") from None
    if not len(known.encoded) == len(known.images) == len(known.logits) >= 1:
        counts = f"{len(known.encoded)} files, {len(known.images)} arrays and {len(known.logits)} logits"
        raise BundleError(
            f"{folder}: {SELF_TEST} holds {counts}; it needs the same number of each, at least 1. Export the bundle again"
        )
    return known


def _verified_contents(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Read every file of a bundle except its weights, which are not used for predictions, and verify the checksums.

    The returned bytes are used from then on, so later changes of the folder have no effect.

    Raises:
        BundleError: a file is missing or has another checksum; the problems name all of them.
    """
    contents: dict[str, bytes] = {}
    problems = [Problem(name, f"{MANIFEST} has no checksum for it") for name in (MODEL, SELF_TEST) if name not in manifest.files]
    for name, expected in manifest.files.items():
        if name == WEIGHTS:
            continue
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError as error:
            problems.append(Problem(name, f"cannot be read ({error.strerror})"))
            continue
        actual = hashlib.sha256(contents[name]).hexdigest()
        if actual != expected:
            problems.append(
                Problem(name, f"has sha256 {actual[:12]}…, {MANIFEST} says {expected[:12]}…: it was changed or cut short")
            )
    if problems:
        raise BundleError(f"{folder}: the bundle is not what was exported. Copy or export it again", problems)
    return contents


def check_provider(provider: Provider) -> None:
    """Check that this installation of ONNX Runtime has an execution provider.

    Raises:
        InvalidInput: it does not have it.
    """
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        known = [name for name, full in PROVIDERS.items() if full in onnxruntime.get_available_providers()]
        raise InvalidInput(
            f"ONNX Runtime has no execution provider for {provider!r} here; it has {', '.join(known)}. Install the build that has"
            " it (onnxruntime-gpu for cuda, onnxruntime-openvino for openvino)"
        )


def _open_session(folder: Path, model: bytes, threads: int, provider: Provider = "cpu") -> onnxruntime.InferenceSession:
    if _EXTERNAL_DATA in model:
        raise BundleError(
            f"{folder}: {MODEL} keeps weights in other files; a bundle's model is one file. Export it with external_data=False"
        )
    try:
        return open_session(model, threads=threads, providers=list(dict.fromkeys([PROVIDERS[provider], PROVIDERS["cpu"]])))
    except ORT_ERRORS as error:
        raise BundleError(f"{folder}: ONNX Runtime {onnxruntime.__version__} cannot open {MODEL}: {error}") from None


def _check_signature(folder: Path, manifest: Manifest, session: onnxruntime.InferenceSession) -> None:
    """Check that inputs, outputs and metadata of the model are those in the manifest.

    Raises:
        BundleError: some differ; the problems name all of them.
    """
    problems = metadata_problems(manifest, session.get_modelmeta().custom_metadata_map)
    inputs = [(entry.name, entry.type, list(entry.shape[1:])) for entry in session.get_inputs()]
    expected = [(manifest.model["input_name"], "tensor(uint8)", [*manifest.preprocess.input_size_px, 3])]
    if inputs != expected:
        problems.append(Problem("inputs", f"{MANIFEST} says {expected}, the model takes {inputs}"))
    outputs = {entry.name: entry for entry in session.get_outputs()}
    if list(outputs) != list(manifest.outputs):
        problems.append(Problem("outputs", f"{MANIFEST} says {list(manifest.outputs)}, the model gives {list(outputs)}"))
    elif (width := outputs["logits"].shape[-1]) != len(manifest.classes):
        problems.append(Problem("classes", f"{MANIFEST} names {len(manifest.classes)}, the model's logits have {width}"))
    if problems:
        raise BundleError(f"{folder}: {MODEL} does not belong to this {MANIFEST}. Export the bundle again", problems)


def _check_self_test(folder: Path, predictor: Predictor, known: SelfTest) -> None:
    """Check the two parts separately: known pixels give known logits (the model), known files give known pixels (preprocessing).

    Raises:
        BundleError: one of them fails; the problems name all that do.
    """
    problems = [*_model_problems(predictor, known), *_image_problems(predictor.manifest.preprocess, known)]
    if problems:
        raise BundleError(f"{folder}: the bundle fails its self-test here", problems)


def _model_problems(predictor: Predictor, known: SelfTest) -> list[Problem]:
    """Return a problem if the model computes other logits from the pixels of the self-test."""
    try:
        logits = predictor.run(known.images).logits
    except (InvalidInput, *ORT_ERRORS) as error:
        return [Problem(_MODEL_SELF_TEST, f"{MODEL} cannot run them: {error}")]
    if logits.shape != known.logits.shape:
        return [Problem(_MODEL_SELF_TEST, f"logits have shape {logits.shape}, {SELF_TEST} has {known.logits.shape}")]
    share = predictor.manifest.model.get("logits_tolerance", LOGITS_TOLERANCE)  # larger for an int8 model
    allowed = share * max(1.0, float(np.abs(known.logits).max()))
    worst = float(np.abs(logits - known.logits).max())
    if worst <= allowed:  # false for NaN as well
        return []
    return [
        Problem(
            _MODEL_SELF_TEST,
            f"logits are off by {worst:.2g}, allowed are {allowed:.2g}: the model gives other results here",
        )
    ]


def _image_problems(preprocess: Preprocess, known: SelfTest) -> list[Problem]:
    """Return a problem for each file of the self-test that is decoded or preprocessed into other pixels."""
    problems = []
    for index, (encoded, expected) in enumerate(zip(known.encoded, known.images, strict=True)):
        where = f"image self-test {index} (bytes → array)"
        try:
            pixels = preprocess.load(encoded)
        except ImageError as error:
            problems.append(Problem(where, f"cannot be decoded here: {error.message}"))
            continue
        difference = float(np.abs(pixels.astype(np.int16) - expected).mean()) if pixels.shape == expected.shape else np.inf
        if not difference <= PIXELS_TOLERANCE:
            problems.append(
                Problem(where, f"off by {difference:.2f} grey levels on average: it is decoded or resized differently here")
            )
    return problems
