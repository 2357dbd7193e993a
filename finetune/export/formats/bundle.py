"""A bundle opened for export: its manifest, its outputs for some images, and its network in torch for formats that need it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.manifest import MODEL, SELF_TEST, Manifest, read_manifest
from finetune.bundle.predictor import Outputs, Predictor, read_self_test
from finetune.bundle.weights import HEAD_BIAS, HEAD_WEIGHT, open_origin
from finetune.errors import ExportError

if TYPE_CHECKING:
    from finetune.model.classifier import Classifier

LOGITS_TOLERANCE = 1e-4  # relative to the largest logit, absolute if that is below 1
_N_NOISE = 2


@dataclass(frozen=True)
class Opened:
    """A bundle in `folder`, which is verified when `predictor` is first used."""

    folder: Path
    runtime: Path | None = None  # folder of an installed onnxruntime-web, for the format ``web``

    @cached_property
    def predictor(self) -> Predictor:
        return Predictor.load(self.folder)

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.folder)

    @property
    def model(self) -> bytes:
        return (self.folder / MODEL).read_bytes()

    @cached_property
    def images(self) -> NDArray[np.uint8]:
        """The images (N, h, w, 3) uint8 to compare outputs on: those of the bundle's self-test, and noise."""
        known = read_self_test(self.folder / SELF_TEST).images
        noise = np.random.default_rng(0).integers(0, 256, (_N_NOISE, *known.shape[1:]), dtype=np.uint8)
        return np.concatenate([known, noise])

    @cached_property
    def outputs(self) -> Outputs:
        """The bundle's outputs for `images`."""
        return self.predictor.run(self.images)

    @cached_property
    def classifier(self) -> Classifier:
        """The network in torch, after its logits have been compared with the bundle's.

        Raises:
            WeightsError: the bundle contains no weights, or the pretrained weights of a frozen backbone cannot be found.
            ExportError: the logits of the network differ from the bundle's.
        """
        import torch

        from finetune.export.graph import DeployModule
        from finetune.export.reference import torch_outputs
        from finetune.model.backbone import build_backbone
        from finetune.model.classifier import Classifier
        from finetune.model.tensors import read_tensors

        origin = open_origin(self.folder)
        torch.manual_seed(origin.seed)
        backbone = build_backbone(origin.architecture, origin=origin)
        backbone.preprocess = self.manifest.preprocess
        classifier = Classifier(backbone, len(self.manifest.classes), origin.pooling)  # type: ignore[arg-type]
        tensors = read_tensors(origin)
        head = (torch.from_numpy(np.array(tensors[name], np.float32)) for name in (HEAD_WEIGHT, HEAD_BIAS))
        classifier = classifier.with_head(*head).eval()
        if not self.is_quantised:
            logits = torch_outputs(DeployModule(classifier, task=self.manifest.task), self.images).logits
            check_logits("the weights in torch", logits, self.outputs.logits)
        return classifier

    @property
    def is_quantised(self) -> bool:
        """Whether ``model.onnx`` is quantised to int8; the weights in the bundle are those before quantisation."""
        return bool(self.manifest.model.get("quantization", {}).get("kept"))


def check_logits(what: str, given: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Compare logits with the expected ones.

    Args:
        what: subject of the error's sentence.

    Raises:
        ExportError: they differ by more than `LOGITS_TOLERANCE`.
    """
    allowed = LOGITS_TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not (difference := float(np.abs(given - expected).max())) <= allowed:
        raise ExportError(
            f"{what} give other predictions than the bundle: logits differ by {difference:.2g}, allowed is {allowed:.2g}"
        )
