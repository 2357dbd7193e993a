"""Where a run is computed, resolved from the request and the machine. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.runtime.device import Device


@dataclass(frozen=True)
class Compute:
    """Device, the precision that was asked for, and the number of processor cores."""

    device: Device
    precision: Literal["auto", "float32", "bfloat16"]
    threads: int
