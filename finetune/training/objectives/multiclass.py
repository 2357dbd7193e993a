"""One label per image: softmax cross entropy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.tasks.balance import Balance
from finetune.training.objectives.objective import with_offsets


@dataclass(frozen=True, eq=False)
class MulticlassObjective:
    """Softmax cross entropy, with class weights or logit offsets for classes of unequal size."""

    task: ClassVar[str] = "multiclass"
    balance: Balance = field(default_factory=Balance)

    def minimising(self, loss: str) -> MulticlassObjective:
        return self

    def balanced(self, balance: Balance) -> MulticlassObjective:
        return replace(self, balance=balance)

    def loss(
        self,
        logits: Tensor,
        targets: Tensor,
        other_targets: Tensor,
        share: float,
        label_smoothing: float,
        image_weights: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        logits = with_offsets(logits, self.balance)
        own, other = image_weights or (None, None)
        loss = self._cross_entropy(logits, targets, label_smoothing, own)
        if share == 1.0:
            return loss
        return share * loss + (1.0 - share) * self._cross_entropy(logits, other_targets, label_smoothing, other)

    def _cross_entropy(self, logits: Tensor, targets: Tensor, label_smoothing: float, image_weights: Tensor | None) -> Tensor:
        """Return the mean cross entropy, with class weights if there are any."""
        if self.balance.weights is None and image_weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        losses = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
        if image_weights is not None:
            losses = image_weights * losses
        if self.balance.weights is None:
            return losses.mean()
        weights = torch.as_tensor(self.balance.weights, dtype=torch.float32, device=logits.device)
        # The mean over images, not `F.cross_entropy(weight=…)`: that divides by the sum of the weights in the batch, so that a
        # batch without rare classes would count as much as one with them.
        return (weights[targets] * losses).mean()

    def n_correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.argmax(dim=1) == targets).sum()

    def probabilities(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, dim=1)
