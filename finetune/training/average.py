"""Average weights: an exponential moving average during training, and linear interpolation between two sets of weights.

Whole state dicts are averaged, so the running statistics of batch normalisation are averaged too; integer buffers are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

M = TypeVar("M", bound=nn.Module)

StateDict = Mapping[str, Tensor]


def copy_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a detached copy of the module's state dict."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


class MovingAverage:
    """The exponential moving average of a module's state. The weight of a value halves every `half_life_steps` updates."""

    def __init__(self, module: nn.Module, half_life_steps: float) -> None:
        self.new_share = 1.0 - 0.5 ** (1.0 / half_life_steps)
        self.state = copy_state(module)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Include the module's current state in the average."""
        current = module.state_dict()
        averaged = [name for name, tensor in self.state.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.state[name] for name in averaged], [current[name] for name in averaged], self.new_share)
        for name in self.state.keys() - set(averaged):
            self.state[name].copy_(current[name])

    def load(self, state: StateDict) -> None:
        """Replace the average by the one in a checkpoint."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])


@contextmanager
def loaded_state(module: nn.Module, state: StateDict) -> Iterator[None]:
    """Load `state` into the module for the block, and restore the module's own values, bit for bit, afterwards."""
    own = copy_state(module)
    module.load_state_dict(dict(state))
    try:
        yield
    finally:
        module.load_state_dict(own)


def interpolate(start: StateDict, end: StateDict, share: float) -> dict[str, Tensor]:
    """Return ``(1 - share) * start + share * end`` for float tensors, and a copy of `end` for the others."""
    return {
        name: torch.lerp(start[name], tensor, share) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in end.items()
    }


@torch.no_grad()
def recalibrate(module: M, inputs: Iterable[Tensor], forward: Callable[[M, Tensor], Tensor]) -> None:
    """Estimate the running statistics of the batch norms that are in train mode anew, as means over `inputs`, in place.

    Afterwards the module is in eval mode, except for these batch norms.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training]
    momenta = [norm.momentum for norm in norms]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
        norm.train()
    for batch in inputs:
        forward(module, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
