"""The registry of models for commands."""

from __future__ import annotations

from typing import Any


def workspace_registry() -> Any:
    """Return the registry of models in the workspace that ``FINETUNE_HOME`` names."""
    from finetune.bundle.registry import Registry
    from finetune.storage.workspace import Workspace

    return Registry(Workspace.from_environment().models)
