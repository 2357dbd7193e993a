"""The devices that networks are computed on. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]

_GPU_DEVICES = "nvidia[0-9]*"


def visible_gpus(devices: Path = Path("/dev")) -> tuple[int, ...]:
    """Return the CUDA devices that this process may use, by number.

    They are those that ``CUDA_VISIBLE_DEVICES`` lists by number, else all of the machine's.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(int(number) for number in chosen.split(",") if number.strip().isdecimal())
    return tuple(sorted(int(device.name.removeprefix("nvidia")) for device in devices.glob(_GPU_DEVICES)))
