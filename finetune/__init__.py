"""finetune: transfer-learning fine-tuning for image classification, from labelled photographs to a served ONNX bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.client import Client

__version__ = "0.1.0"
__all__ = ["Client", "__version__"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: importing `finetune` itself costs nothing."""
    if name == "Client":
        from finetune.client import Client

        return Client
    raise AttributeError(f"module 'finetune' has no attribute {name!r}")
