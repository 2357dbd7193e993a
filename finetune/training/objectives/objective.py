"""The protocol of a training objective: the side of a task that needs torch."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from finetune.tasks.balance import Balance


class Objective(Protocol):
    """Loss and link function of one task. Targets are encoded as the task encodes them."""

    @property
    def task(self) -> str:
        """The name of the task."""
        ...

    def minimising(self, loss: str) -> Objective:
        """Return the objective with this loss, one of those that the task names."""
        ...

    def balanced(self, balance: Balance) -> Objective:
        """Return the objective with this done about classes of different size."""
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
        """Return the mean loss of logits (B, C), in float32.

        Args:
            other_targets, share: with mixup, the targets of the image that was blended in, and the share of the image's own.
            image_weights: (B,) each: of the images and of those that were blended in; None weighs all the same.
        """
        ...

    def n_correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return how many of B images are answered rightly, as the task's `of_images` counts; a scalar tensor."""
        ...

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, C) logits to probabilities: the link function, as it is exported."""
        ...
