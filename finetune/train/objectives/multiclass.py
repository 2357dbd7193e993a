"""One label per image: softmax cross entropy, and multinomial logistic regression for the solved head."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from finetune.features.solve import SolvedHead, solve_softmax_head


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

    def solve_head(
        self,
        features: NDArray[np.floating[Any]],
        targets: NDArray[Any],
        n_classes: int,
        *,
        val_features: NDArray[np.floating[Any]] | None,
        val_targets: NDArray[Any] | None,
        l2: float | None,
        label_smoothing: float,
        seed: int,
    ) -> SolvedHead:
        return solve_softmax_head(
            features,
            targets,
            n_classes,
            val_features=val_features,
            val_labels=val_targets,
            l2=l2,
            label_smoothing=label_smoothing,
            seed=seed,
        )
