"""One label per image: softmax cross entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class MulticlassObjective:
    """Cross entropy over classes that exclude each other."""

    task = "multiclass"

    def loss(self, logits: Tensor, targets: Tensor, other_targets: Tensor, share: float, label_smoothing: float) -> Tensor:
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        if share == 1.0:
            return loss
        return share * loss + (1.0 - share) * F.cross_entropy(logits, other_targets, label_smoothing=label_smoothing)

    def n_correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.argmax(dim=1) == targets).sum()

    def probabilities(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, dim=1)
