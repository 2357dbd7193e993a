"""Write a bundle: model, manifest and self-test in a folder that appears only when it is complete and has been checked.

Torch-free: the model is passed as an ONNX file, and the trained network's outputs as a `Reference`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune import __version__
from finetune.bundle.calibration import write_subspace
from finetune.bundle.card import model_card
from finetune.bundle.manifest import CARD, DRIFT, MODEL, NOVELTY, SELF_TEST, WEIGHTS, Manifest, OutputName, write_manifest
from finetune.bundle.predictor import Predictor, Seen, write_self_test
from finetune.bundle.preprocess import Preprocess
from finetune.data.dataset import Sample
from finetune.errors import ExportError
from finetune.export.agreement import Reference, parity, parity_samples
from finetune.export.quantize import LOGITS_TOLERANCE, N_CALIBRATION, Quantization, quantize_if_as_good
from finetune.export.template import Head, with_metadata
from finetune.metrics.novelty import Subspace
from finetune.model.facts import BackboneFacts
from finetune.model.tensors import Tensors, serialised_tensors
from finetune.monitoring.reference import Reference as DriftReference
from finetune.monitoring.reference import write_reference
from finetune.progress import Progress, ProgressCallback, silent
from finetune.runtime.session import INPUT_NAME, OPSET, open_session
from finetune.storage.files import atomic_folder, write_atomic
from finetune.tasks import task_named

_LIBRARIES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow", "albumentations")
_N_PROBES = 3
_N_EVALUATED = 1000  # images that int8 is evaluated on, at most


@dataclass(frozen=True)
class KeptWeights:
    """The weights in a bundle, with which training can be continued or the model written in another format.

    Args:
        backbone: its tensors under timm's names; empty if they still are the pretrained weights.
        seed: that a backbone without pretrained weights was initialised with.
    """

    head: Head
    pooling: str
    seed: int
    backbone: Tensors = field(default_factory=dict, repr=False)

    def serialised(self) -> bytes:
        """Return the content of ``weights.safetensors``."""
        return serialised_tensors(self.head.weight, self.head.bias, self.backbone, pooling=self.pooling, seed=self.seed)


@dataclass(frozen=True)
class ExportedNetwork:
    """A trained network as one ONNX file, with its description and a function that returns its outputs for comparison."""

    model: bytes = field(repr=False)
    backbone: BackboneFacts
    preprocess: Preprocess
    exporter: str
    reference: Callable[[Sequence[Sample], NDArray[np.uint8]], Reference]
    """Returns the network's outputs for N samples; the second argument is their preprocessed pixels (N, h, w, 3) uint8."""
    kept: KeptWeights

    @property
    def outputs(self) -> tuple[OutputName, ...]:
        """The names of the model's outputs, in order."""
        return ("probs", "logits", "cam", "embedding") if self.backbone.cam_kind else ("probs", "logits", "embedding")


@dataclass(frozen=True)
class BundleFacts:
    """The content of the manifest that does not follow from the network."""

    name: str
    task: str  # multiclass, multilabel
    classes: tuple[str, ...]  # in the order of the logits
    method: Mapping[str, Any]
    spec_digest: str
    metrics: Mapping[str, float] = field(default_factory=dict)  # val/top1 …
    calibration: Mapping[str, Any] = field(default_factory=dict)  # its temperature, if any, divides the logits in the graph
    subspace: Subspace | None = None  # of the embeddings of known images, to recognise images unlike them
    reference: DriftReference | None = None  # that live predictions are compared with
    frozen: Mapping[str, Any] = field(default_factory=dict)  # stages, digest_before, digest_after
    seen: Seen = field(default_factory=Seen)  # the images that the weights were trained and chosen on
    created_at: float = field(default_factory=time.time)

    @property
    def temperature(self) -> float:
        return float(self.calibration.get("temperature", 1.0))


def export_bundle(
    network: ExportedNetwork,
    facts: BundleFacts,
    samples: Sequence[Sample],
    out: Path,
    *,
    threads: int = 1,
    quantize: Literal["none", "int8"] = "none",
    training: Sequence[Sample] = (),
    progress: ProgressCallback = silent,
) -> Manifest:
    """Write a network as the bundle folder `out`, which is replaced if it exists; return the manifest.

    Args:
        samples: images of the dataset, preferably those of val; the export is compared with the trained network on them, and
            some become the self-test.
        threads: for running the model.
        quantize: an int8 model is kept only if it is as good on `samples`; ``manifest.model["quantization"]`` records the result.
        training: images that int8 is calibrated on; by default `samples`.

    Raises:
        ExportError: the outputs of the exported model differ from the trained network's, or there are no samples.
    """
    if not samples:
        raise ExportError("an exported bundle is checked on images, and none were given: pass validation samples")
    progress(Progress("exporting", 0, 3, "steps", message="comparing the export with the trained network"))
    compared = parity_samples(samples)
    files = [sample.read() for sample in compared]
    images = np.stack([network.preprocess.load(data) for data in files])  # (N, h, w, 3) uint8
    manifest = _manifest(network, facts)
    model = network.model
    predictor = Predictor(manifest, open_session(model, threads=threads))
    reference = network.reference(compared, images)
    report = parity(reference, images, predictor, files)
    if problems := report.problems():
        raise ExportError(
            f"{network.backbone.name}: the exported model does not give the predictions of the trained one", problems
        )
    reference.when_agreed()
    manifest = dataclasses.replace(manifest, parity=report.to_dict())
    if quantize == "int8":
        progress(Progress("exporting", 1, 3, "steps", message="quantising to int8"))
        model, outcome = _quantised(model, facts, manifest.preprocess, samples, training or samples, threads)
        manifest = dataclasses.replace(manifest, model={**manifest.model, **_quantization_entry(outcome)})
        predictor = Predictor(manifest, open_session(model, threads=threads))
        progress(Progress("exporting", 2, 3, "steps", message=outcome.sentence))
    with atomic_folder(out) as folder:
        kept = network.kept.serialised()
        write_atomic(folder / WEIGHTS, lambda stream: stream.write(kept))
        manifest = _write(folder, model, manifest, predictor, files[:_N_PROBES], images[:_N_PROBES], facts)
        Predictor.load(folder)
    progress(Progress("exporting", 3, 3, "steps", message="bundle written"))
    return manifest


def _quantised(
    model: bytes,
    facts: BundleFacts,
    preprocess: Preprocess,
    samples: Sequence[Sample],
    training: Sequence[Sample],
    threads: int,
) -> tuple[bytes, Quantization]:
    """Return the int8 model if it is as good on `samples`, else the model itself."""
    evaluated = _evenly_spaced(samples, _N_EVALUATED)
    return quantize_if_as_good(
        model,
        calibration=np.stack([sample.decode(preprocess.load) for sample in _evenly_spaced(training, N_CALIBRATION)]),
        images=np.stack([sample.decode(preprocess.load) for sample in evaluated]),
        targets=task_named(facts.task).encode([sample.target for sample in evaluated], len(facts.classes)),
        task=task_named(facts.task),
        threads=threads,
    )


def _quantization_entry(outcome: Quantization) -> dict[str, Any]:
    tolerance = {"logits_tolerance": LOGITS_TOLERANCE} if outcome.kept else {}
    return {"quantization": outcome.to_dict(), **tolerance}


def _write(
    folder: Path,
    model: bytes,
    manifest: Manifest,
    predictor: Predictor,
    encoded: Sequence[bytes],
    images: NDArray[np.uint8],
    facts: BundleFacts,
) -> Manifest:
    """Write all files, the manifest last."""
    described = with_metadata(model, manifest.model_metadata())
    write_atomic(folder / MODEL, lambda stream: stream.write(described))
    write_self_test(folder / SELF_TEST, encoded, images, predictor.run(images).logits, facts.seen)
    if facts.subspace is not None:
        write_subspace(folder / NOVELTY, facts.subspace)
    if facts.reference is not None:
        quantised = manifest.model.get("quantization", {}).get("kept")  # its embeddings are not quite those of the table
        write_reference(folder / DRIFT, facts.reference.without_distances() if quantised else facts.reference)
    write_atomic(folder / CARD, lambda stream: stream.write(model_card(manifest).encode()))
    return write_manifest(folder, manifest)


def _manifest(network: ExportedNetwork, facts: BundleFacts) -> Manifest:
    """Return the manifest without the results of the comparison and without checksums."""
    backbone = network.backbone
    return Manifest(
        name=facts.name,
        version=None,
        created_at=facts.created_at,
        task=facts.task,
        classes=facts.classes,
        preprocess=network.preprocess,
        backbone={"name": backbone.name, "weights": dict(backbone.weights), "n_parameters": backbone.n_parameters},
        method=dict(facts.method),
        spec_digest=facts.spec_digest,
        outputs=network.outputs,
        cam={"available": backbone.cam_kind is not None, "kind": backbone.cam_kind, "reason": backbone.cam_reason},
        metrics=dict(facts.metrics),
        calibration=dict(facts.calibration),
        frozen=dict(facts.frozen),
        versions=_versions(),
        model={"input_name": INPUT_NAME, "opset": OPSET, "exporter": network.exporter},
    )


def _versions() -> dict[str, str]:
    found = {"finetune": __version__}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _evenly_spaced(samples: Sequence[Sample], n: int) -> Sequence[Sample]:
    """Return at most `n` samples, evenly spaced in their order, and so over the classes."""
    chosen = np.linspace(0, len(samples) - 1, min(n, len(samples))).round().astype(int)
    return [samples[index] for index in chosen]
