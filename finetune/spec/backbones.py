"""The ways in which ``model.backbone`` may name a network. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path

DEFAULT_BACKBONE = "tf_efficientnet_lite0"
LOCAL_FOLDER, ON_HUB = "local-dir:", "hf-hub:"  # timm's prefixes of models in a folder and on the hub
_REGISTERED = r"[a-z0-9][a-z0-9._-]{0,62}@[1-9][0-9]*"
_HUB_PART = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"  # the hub's rule for names
HUB_NAME = rf"({_HUB_PART})/({_HUB_PART})(@[A-Za-z0-9][A-Za-z0-9._/-]{{0,199}})?"


def is_own_model(backbone: str) -> bool:
    """Return whether ``model.backbone`` refers to a model made by finetune: ``name@version``, or a run or bundle folder."""
    if backbone.startswith((LOCAL_FOLDER, ON_HUB)):
        return False
    return "@" in backbone or "/" in backbone or backbone.startswith(".")


def is_registered_model(backbone: str) -> bool:
    """Return whether ``model.backbone`` refers to a registered version by its number."""
    return re.fullmatch(_REGISTERED, backbone) is not None


def absolute_backbone(backbone: str) -> str:
    """Return ``model.backbone``, made absolute if it is a folder."""
    if backbone.startswith(LOCAL_FOLDER):
        return f"{LOCAL_FOLDER}{Path(backbone.removeprefix(LOCAL_FOLDER)).absolute()}"
    is_folder = is_own_model(backbone) and not is_registered_model(backbone)
    return str(Path(backbone).absolute()) if is_folder else backbone
