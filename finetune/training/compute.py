"""Resolve device, precision and threads of a run from the request and the machine.

Torch is imported only if there may be a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.errors import InvalidInput
from finetune.runtime.device import Device, may_have_gpu


@dataclass(frozen=True)
class Compute:
    """Device, requested precision and number of threads of a run."""

    device: Device
    precision: Literal["auto", "float32", "bfloat16"]
    threads: int


LEAST_VIEWS = 20_000  # in shorter runs, starting the processes takes longer than they save
LEAST_THREADS, MOST_PROCESSES = 4, 12
NOT_FOR_VIEWS = 2  # number of threads that the training process keeps


def view_processes(compute: Compute, n_views: int) -> int:
    """Return how many processes compute the training views of a run; 0 if its own threads do.

    On a CPU there are none: the network takes far longer than the views, and needs all cores.
    """
    if compute.device == "cpu" or compute.threads < LEAST_THREADS or n_views < LEAST_VIEWS:
        return 0
    return min(compute.threads - NOT_FOR_VIEWS, MOST_PROCESSES)


def resolve_device(asked: Device | Literal["auto"]) -> Device:
    """Return the device to compute on; ``auto`` is a GPU if PyTorch finds one.

    Raises:
        InvalidInput: a GPU is requested, but PyTorch finds none.
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
