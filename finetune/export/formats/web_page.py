"""The format ``web``: one HTML file with the model and ONNX Runtime Web, which classifies images in the browser without a server.

The page resizes and crops an image as `finetune.bundle.preprocess` does. Only the browser's JPEG decoder differs a little (by one
or two levels of 255); the same pixels give the same result.
"""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.bundle.manifest import MODEL
from finetune.errors import MissingExtra, NotFound
from finetune.storage.files import write_atomic

if TYPE_CHECKING:
    from finetune.export.formats.bundle import Opened

PAGE = "index.html"
_TEMPLATE = Path(__file__).parent / "templates" / "web.html"
_INSTALLED = Path("node_modules/onnxruntime-web")
_SCRIPT, _WASM = "dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm"


def write(opened: Opened, folder: Path) -> str:
    """Write ``index.html`` and ``model.onnx``.

    Raises:
        MissingExtra: onnxruntime-web is not installed.
        NotFound: the folder given for it does not contain the files of a supported version.
    """
    runtime = opened.runtime or _INSTALLED
    if not runtime.is_dir():
        raise MissingExtra(
            "--format web puts ONNX Runtime Web into the page: npm install onnxruntime-web, then run this in the same folder or "
            "give --onnxruntime-web node_modules/onnxruntime-web"
        )
    if missing := [name for name in (_SCRIPT, _WASM) if not (runtime / name).is_file()]:
        raise NotFound(
            f"{runtime}: no {' and no '.join(missing)}: give the folder of the npm package onnxruntime-web, 1.20 or newer"
        )
    opened.predictor  # noqa: B018  # verifies the bundle
    page = _page(opened, (runtime / _SCRIPT).read_text(encoding="utf-8"), (runtime / _WASM).read_bytes())
    write_atomic(folder / PAGE, lambda stream: stream.write(page.encode()))
    write_atomic(folder / MODEL, lambda stream: stream.write(opened.model))
    return f"open {PAGE} in a browser and drop a picture on it; nothing leaves the browser"


def _page(opened: Opened, script: str, wasm: bytes) -> str:
    """Return the page: the template with classes, preprocessing, model and runtime filled in."""
    manifest = opened.manifest
    facts = {
        "classes": list(manifest.classes),
        "preprocess": manifest.preprocess.to_dict(),
        "thresholds": manifest.thresholds,  # of each class in a multilabel task, else null
        "hasMap": "cam" in manifest.outputs,
        "inputName": manifest.model["input_name"],
    }
    filled = {
        "TITLE": html.escape(manifest.name if manifest.version is None else f"{manifest.name}, version {manifest.version}"),
        "FACTS": json.dumps(facts).replace("<", "\\u003c"),
        "SCRIPT": base64.b64encode(script.encode()).decode(),
        "WASM": base64.b64encode(wasm).decode(),
        "MODEL": base64.b64encode(opened.model).decode(),
    }
    # In one pass, so that a class whose name looks like a placeholder is not replaced.
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda place: filled[place[1]], _TEMPLATE.read_text(encoding="utf-8"))
