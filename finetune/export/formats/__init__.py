"""A model in another format than the bundle's, for other tools: one file for each format, which all have the same protocol.

Each has a function `write`, which takes an opened bundle (`finetune.export.formats.bundle.Opened`) and an empty folder, writes
the model into it, compares what it has written with the bundle's own answers, and returns in one sentence how it is used.
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
"""The module of each format. Each has `write`; those that need no torch work without it."""


def write_format(name: str, opened: Opened, out: Path) -> str:
    """Write a model in a format into the new folder `out`, with its model card; return how it is used.

    Raises:
        InvalidInput: no such format, or the model cannot be expressed in it.
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
