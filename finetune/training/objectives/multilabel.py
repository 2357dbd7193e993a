"""Several labels per image: binary cross entropy of each label, or the asymmetric loss."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.tasks.balance import Balance
from finetune.training.objectives.objective import with_offsets

LossName = Literal["binary_cross_entropy", "asymmetric"]

# Ridnik et al. 2021, "Asymmetric loss for multi-label classification" (ICCV, arXiv:2009.14119): an absent label that already has
# a low probability contributes almost nothing to the loss, so that the many absent labels do not outweigh the few present ones.
# The values are the paper's, which uses plain cross entropy for present labels (an exponent of 0).
FOCUS_ABSENT = 4.0  # the exponent for absent labels
MARGIN = 0.05  # is subtracted from the probability of an absent label
_SMALLEST_PROBABILITY = 1e-8


@dataclass(frozen=True, eq=False)
class MultilabelObjective:
    """The mean over images and labels of a binary loss, with weights or logit offsets for rare labels."""

    task: ClassVar[str] = "multilabel"
    balance: Balance = field(default_factory=Balance)
    chosen: LossName = "binary_cross_entropy"

    def minimising(self, loss: str) -> MultilabelObjective:
        return replace(self, chosen=cast(LossName, loss))

    def balanced(self, balance: Balance) -> MultilabelObjective:
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
        loss = self._one(logits, targets, label_smoothing, own)
        if share == 1.0:
            return loss
        return share * loss + (1.0 - share) * self._one(logits, other_targets, label_smoothing, other)

    def _one(self, logits: Tensor, targets: Tensor, label_smoothing: float, image_weights: Tensor | None) -> Tensor:
        wanted = targets.to(torch.float32) * (1.0 - label_smoothing) + 0.5 * label_smoothing
        weights = self.balance.weights
        of_present = None if weights is None else torch.as_tensor(weights, dtype=torch.float32, device=logits.device)
        if self.chosen == "binary_cross_entropy":
            if image_weights is None:
                return F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=of_present)
            return F.binary_cross_entropy_with_logits(logits, wanted, image_weights[:, None], pos_weight=of_present)
        present, absent = torch.sigmoid(logits), (torch.sigmoid(-logits) + MARGIN).clamp(max=1.0)
        gain = wanted * present.clamp(min=_SMALLEST_PROBABILITY).log()
        gain = gain if of_present is None else gain * of_present
        losses = -(gain + (1.0 - wanted) * absent.clamp(min=_SMALLEST_PROBABILITY).log() * (1.0 - absent) ** FOCUS_ABSENT)
        return (losses if image_weights is None else image_weights[:, None] * losses).mean()

    def n_correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        return ((logits >= 0) == targets.bool()).all(dim=1).sum()

    def probabilities(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)
