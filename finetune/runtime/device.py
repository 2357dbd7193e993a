"""The devices that networks are computed on. Torch-free."""

from __future__ import annotations

from typing import Literal

Device = Literal["cpu", "cuda"]
