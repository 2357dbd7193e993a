"""The protocol of a training objective: the part of a task that needs torch."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from finetune.tasks.balance import Balance


class Objective(Protocol):
    """Loss and link function of one task, for targets as the task encodes them."""

    @property
    def task(self) -> str:
        """The name of the task."""
        ...

    def minimising(self, loss: str) -> Objective:
        """Return the objective with this loss, one of `Task.losses`."""
        ...

    def balanced(self, balance: Balance) -> Objective:
        """Return the objective with these class weights or logit offsets."""
        ...

    def loss(
        self,
        logits: Tensor,
        targets: Tensor,
        other_targets: Tensor,
        share: float,
        label_smoothing: float,
        image_weights: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the mean loss of logits (B, C), a scalar float32 tensor.

        Args:
            other_targets: with mixup, the targets of the images that were blended in.
            share: with mixup, the share of each image's own target; 1 without.
            image_weights: (B,) each, of the images and with mixup of those that were blended in; None: all equal.
        """
        ...

    def n_correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return how many of B images are predicted correctly, as the task's metric `mean_score` counts; a scalar tensor."""
        ...

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (B, C) of logits (B, C): the link function, as it is exported."""
        ...


def with_offsets(logits: Tensor, balance: Balance) -> Tensor:
    """Return logits (B, C) in float32, with the offsets of logit adjustment added if there are any."""
    logits = logits.float()
    if balance.offsets is None:
        return logits
    return logits + torch.as_tensor(balance.offsets, dtype=torch.float32, device=logits.device)
