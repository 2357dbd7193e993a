"""Find the devices that networks can be computed on, without importing torch."""

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
    """Return the numbers of the CUDA devices that this process may use.

    They are the numbers in ``CUDA_VISIBLE_DEVICES`` if it is set, else all devices of the machine.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(int(number) for number in chosen.split(",") if number.strip().isdecimal())
    return tuple(sorted(int(device.name.removeprefix("nvidia")) for device in devices.glob(_GPU_DEVICES)))


def may_have_gpu() -> bool:
    """Return False if no GPU driver is installed, so that PyTorch cannot find a GPU; True if only PyTorch can tell.

    Loading the driver's library takes a millisecond; asking PyTorch would require importing it.
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
