"""Device, precision and cores of a run, resolved from the request and the machine; asks torch only where there may be a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.errors import InvalidInput
from finetune.runtime.device import Device, may_have_gpu


@dataclass(frozen=True)
class Compute:
    """Device, the precision that was asked for, and the number of processor cores."""

    device: Device
    precision: Literal["auto", "float32", "bfloat16"]
    threads: int


def resolve_device(asked: Device | Literal["auto"]) -> Device:
    """Return the device to compute on; ``auto`` takes a GPU where PyTorch sees one.

    Raises:
        InvalidInput: a GPU is asked for and PyTorch sees none.
    """
    if asked == "cpu":
        return "cpu"
    if _sees_gpu():
        return "cuda"
    if asked == "cuda":
        raise InvalidInput("compute.device: cuda is asked for, but PyTorch sees no CUDA device here. Use device: cpu, or auto.")
    return "cpu"


def _sees_gpu() -> bool:
    if not may_have_gpu():
        return False
    import torch

    return torch.cuda.is_available()
