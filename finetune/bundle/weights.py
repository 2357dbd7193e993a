"""``weights.safetensors``: what a bundle keeps so that its network can be trained on, or leave in another format. Torch-free.

The head is always in it (``head.weight``, ``head.bias``). The backbone's tensors, as timm names them behind ``backbone.``, are in
it where they are not the pretrained ones any more; a backbone that stayed frozen is found again by what the manifest says of its
weights. Serving never reads the file.
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
METADATA_KEY = "finetune"  # in the file's header: a JSON object with the head's pooling and the seed


@dataclass(frozen=True)
class Origin:
    """A bundle that another model starts from."""

    folder: Path
    manifest: Manifest
    pooling: str
    seed: int  # of a backbone that was not pretrained

    @property
    def reference(self) -> str:
        """``name@version``, or the name alone of a bundle that is not registered."""
        return self.manifest.name if self.manifest.version is None else f"{self.manifest.name}@{self.manifest.version}"

    @property
    def architecture(self) -> str:
        """What timm calls the network."""
        return str(self.manifest.backbone["name"])

    @property
    def file(self) -> Path:
        return self.folder / WEIGHTS

    def lineage(self) -> dict[str, Any]:
        """Return where the weights come from, down to the pretrained ones."""
        weights = dict(self.manifest.backbone.get("weights") or {})
        return {"model": self.reference, "spec_digest": self.manifest.spec_digest, "weights": weights}


def find_origin(backbone: str, models: Path) -> Origin:
    """Return the bundle that ``model.backbone`` means.

    Args:
        models: the folder of registered models.

    Raises:
        NotFound: no such model, version or folder.
        WeightsError: the bundle keeps no weights, as those of earlier releases.
    """
    from finetune.bundle.registry import Registry

    if is_registered_model(backbone):
        folder = Registry(models).lookup(backbone).path
    else:
        found = [path for path in (Path(backbone) / "bundle", Path(backbone)) if (path / MANIFEST).is_file()]
        if not found:
            raise NotFound(f"model.backbone: {backbone}: no run that was exported, and no bundle, is in this folder")
        folder = found[0]
    return open_origin(folder)


def open_origin(folder: Path) -> Origin:
    """Return the bundle in a folder as something to start from; see `find_origin`."""
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
