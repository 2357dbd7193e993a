"""finetune: transfer-learning fine-tuning for image classification, from labelled photographs to a served ONNX bundle.

`train`, `compare`, `check`, `suggest` and `load` are the Python API; `Client` is a client of a server. They are imported on first
use, so that ``import finetune`` itself is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.api import Model, Run, check, compare, load, suggest, train
    from finetune.bundle.calibration import CertaintyOptions
    from finetune.client import Client
    from finetune.errors import FinetuneError

__version__ = "0.1.0"
__all__ = [
    "CertaintyOptions",
    "Client",
    "FinetuneError",
    "Model",
    "Run",
    "__version__",
    "check",
    "compare",
    "load",
    "suggest",
    "train",
]
_MODULES = {"Client": "finetune.client", "FinetuneError": "finetune.errors"}  # others are in finetune.api


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_MODULES.get(name, "finetune.api")), name)
    raise AttributeError(f"module 'finetune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
