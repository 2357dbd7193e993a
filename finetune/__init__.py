"""finetune: transfer-learning fine-tuning for image classification, from labelled photographs to a served ONNX bundle.

`train`, `compare`, `check` and `load` are the Python door; they are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.api import Model, Run, check, compare, load, train

__version__ = "0.1.0"
__all__ = ["Model", "Run", "__version__", "check", "compare", "load", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from finetune import api

        return getattr(api, name)
    raise AttributeError(f"module 'finetune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
