"""The devices that networks are computed on. Torch-free."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]

_AMD_DRIVER = Path("/dev/kfd")  # PyTorch calls AMD's GPUs cuda too
_GPU_DEVICES = "nvidia[0-9]*"


def visible_gpus(devices: Path = Path("/dev")) -> tuple[int, ...]:
    """Return the CUDA devices that this process may use, by number.

    They are those that ``CUDA_VISIBLE_DEVICES`` lists by number, else all of the machine's.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(int(number) for number in chosen.split(",") if number.strip().isdecimal())
    return tuple(sorted(int(device.name.removeprefix("nvidia")) for device in devices.glob(_GPU_DEVICES)))


def may_have_gpu() -> bool:
    """Return False where PyTorch cannot find a GPU because there is no driver for one; else only PyTorch knows.

    Asking the loader for the driver takes a millisecond, asking PyTorch its import.
    """
    if sys.platform == "darwin":
        return False  # Metal is another device
    if _AMD_DRIVER.exists():
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
