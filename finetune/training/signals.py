"""Measure gradients, weights and updates of each stage at some steps, for the diagnosis.

For each group that trains (``stage0`` … ``head``) these are the norm of its gradient before clipping, the norm of its weights,
and its update ratio: the norm of the update divided by the norm of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Parameters = Mapping[str, Sequence[nn.Parameter]]  # by key


class StepMeter:
    """Measures one optimiser step. Construct it between the backward pass and the step, and call `measure` after the step."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.before = {key: [p.detach().clone() for p in members] for key, members in parameters.items()}
        self.gradient_norms = {key: _norm([p.grad for p in members if p.grad is not None]) for key, members in parameters.items()}

    def measure(self) -> dict[str, float]:
        """Return ``grad_norm/KEY``, ``weight_norm/KEY`` and ``update_ratio/KEY`` for each key."""
        values = {}
        for key, members in self.parameters.items():
            weight_norm = _norm(self.before[key])
            moved = torch._foreach_sub([p.detach() for p in members], self.before[key])
            values[f"grad_norm/{key}"] = self.gradient_norms[key]
            values[f"weight_norm/{key}"] = weight_norm
            values[f"update_ratio/{key}"] = _norm(moved) / max(weight_norm, 1e-12)
        return values


def _norm(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of all elements together."""
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))) if tensors else 0.0
