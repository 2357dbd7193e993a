"""The format ``onnx``: the bundle's ``model.onnx`` alone. It takes uint8 pixels; its metadata names classes and preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.bundle.manifest import MODEL
from finetune.storage.files import write_atomic

if TYPE_CHECKING:
    from finetune.export.formats.bundle import Opened


def write(opened: Opened, folder: Path) -> str:
    """Write ``model.onnx``."""
    opened.predictor  # noqa: B018  # verifies the bundle
    write_atomic(folder / MODEL, lambda stream: stream.write(opened.model))
    height, width = opened.manifest.preprocess.input_size_px
    return f"input images: uint8 (batch, {height}, {width}, 3), RGB; outputs {', '.join(opened.manifest.outputs)}"
