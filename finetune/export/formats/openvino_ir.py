"""The format ``openvino``: OpenVINO IR in float32. It is converted by the package ``openvino`` and compared with the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.bundle.manifest import MODEL
from finetune.distribution import install_command
from finetune.errors import ExportError, MissingExtra

if TYPE_CHECKING:
    from finetune.export.formats.bundle import Opened

TOLERANCE = 5e-6  # of a probability
FILE = "model.xml"


def write(opened: Opened, folder: Path) -> str:
    """Write ``model.xml`` and ``model.bin``.

    Raises:
        MissingExtra: the package ``openvino`` is not installed.
        ExportError: the probabilities computed by OpenVINO differ from the bundle's.
    """
    try:
        import openvino
    except ModuleNotFoundError:
        raise MissingExtra(f"--format openvino needs the package openvino: {install_command('openvino')}") from None
    core = openvino.Core()
    openvino.save_model(core.read_model(opened.folder / MODEL), folder / FILE, compress_to_fp16=False)
    compiled = core.compile_model(folder / FILE, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    probs = np.concatenate([compiled(image[None])["probs"] for image in opened.images])
    difference = float(np.abs(probs - opened.outputs.probs).max())
    if not difference <= TOLERANCE and not opened.is_quantised:
        raise ExportError(f"OpenVINO gives other predictions than the bundle: probabilities differ by {difference:.2g}")
    return f"openvino.compile_model({FILE!r}, 'CPU'); probabilities differ from the bundle's by {difference:.1g} at most"
