"""The weights of a bundle, ``weights.safetensors``, for further training and for export to other formats. Torch-free.

The file always contains the head (``head.weight``, ``head.bias``). It contains the backbone's tensors (timm's names with the
prefix ``backbone.``) only if they differ from the pretrained ones; the weights of a backbone that stayed frozen are found again
by their entry in the manifest. The file is not used for serving.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.bundle.manifest import MANIFEST, WEIGHTS, Manifest, read_manifest
from finetune.errors import NotFound, WeightsError
from finetune.spec import is_registered_model

BACKBONE = "backbone."
HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"
METADATA_KEY = "finetune"  # in the file's header: a JSON object with pooling and seed


@dataclass(frozen=True)
class Origin:
    """A bundle whose model another training starts from."""

    folder: Path
    manifest: Manifest
    pooling: str
    seed: int  # that a backbone which is not pretrained was initialised with

    @property
    def reference(self) -> str:
        """``name@version``; only the name if the bundle is not registered."""
        return self.manifest.reference

    @property
    def architecture(self) -> str:
        """timm's name of the network."""
        return str(self.manifest.backbone["name"])

    @property
    def file(self) -> Path:
        return self.folder / WEIGHTS

    def lineage(self) -> dict[str, Any]:
        """Return the origin of the weights as JSON values, with the chain of models down to the pretrained weights."""
        weights = dict(self.manifest.backbone.get("weights") or {})
        return {"model": self.reference, "spec_digest": self.manifest.spec_digest, "weights": weights}


def find_origin(backbone: str, models: Path) -> Origin:
    """Return the bundle that ``model.backbone`` refers to.

    Args:
        models: the folder of registered models.

    Raises:
        NotFound: there is no such model, version or folder.
        WeightsError: the bundle contains no weights, because an earlier release made it.
    """
    from finetune.bundle.registry import Registry

    if is_registered_model(backbone):
        folder = Registry(models).lookup(backbone).path
    else:
        found = [path for path in (Path(backbone) / "bundle", Path(backbone)) if (path / MANIFEST).is_file()]
        if not found:
            raise NotFound(f"model.backbone: {backbone}: this folder is neither a bundle nor a run that exported a model")
        folder = found[0]
    return open_origin(folder)


def open_origin(folder: Path) -> Origin:
    """Return the bundle in a folder as an `Origin`.

    Raises:
        BundleError: there is no bundle in the folder.
        WeightsError: the bundle contains no weights, or they cannot be read.
    """
    manifest = read_manifest(folder)
    if WEIGHTS not in manifest.files:
        raise WeightsError(
            f"{manifest.name}: this bundle was made by an earlier release and keeps no weights to train on or to export: "
            "train it again"
        )
    kept = _metadata(folder / WEIGHTS)
    return Origin(folder, manifest, str(kept["pooling"]), int(kept["seed"]))


def _metadata(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file's header, without reading the tensors."""
    try:
        with open(path, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(size, 1 << 26)))
        found: dict[str, Any] = json.loads(header["__metadata__"][METADATA_KEY])
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path}: cannot be read as the weights of a bundle ({type(error).__name__}); export it again"
        ) from None
