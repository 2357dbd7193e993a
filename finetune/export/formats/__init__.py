"""Write a bundle's model in the format of another tool, with one module for each format.

Each module has a function `write`, which takes an opened bundle (`finetune.export.formats.bundle.Opened`) and an empty folder,
writes the model into the folder, compares it with the bundle's outputs where it can, and returns a sentence that says how to use
it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.bundle.card import model_card
from finetune.bundle.manifest import CARD
from finetune.errors import Conflict, InvalidInput, did_you_mean
from finetune.storage.files import atomic_folder, write_atomic

if TYPE_CHECKING:
    from finetune.export.formats.bundle import Opened

FORMATS = {
    "timm": "timm_folder",
    "safetensors": "safetensors_file",
    "onnx": "onnx_file",
    "openvino": "openvino_ir",
    "web": "web_page",
}
"""The module of each format; torch is imported only by modules that need it."""


def write_format(name: str, opened: Opened, out: Path) -> str:
    """Write a model and its model card in the format `name` into the new folder `out`; return a sentence that says how to use it.

    Raises:
        InvalidInput: there is no such format, or the model cannot be expressed in it.
        Conflict: `out` exists.
    """
    if name not in FORMATS:
        raise InvalidInput(f"no format {name!r}; there are {', '.join(FORMATS)}.{did_you_mean(name, list(FORMATS))}")
    if out.exists():
        raise Conflict(f"{out} exists: give a folder that does not, with --out")
    with atomic_folder(out) as folder:
        use: str = importlib.import_module(f"{__name__}.{FORMATS[name]}").write(opened, folder)
        if not (folder / CARD).exists():
            card = model_card(opened.manifest)
            write_atomic(folder / CARD, lambda stream: stream.write(card.encode()))
    return use
