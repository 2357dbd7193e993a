"""The training loss and what is random in a step, each a pure function of position: the same (seed, step) gives the same bits."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def step_seed(seed: int, step: int) -> int:
    """The seed of everything that is random inside optimiser step `step`: dropout, drop path, mixup. Below 2**63."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def mix(images: Tensor, labels: Tensor, alpha: float, seed: int) -> tuple[Tensor, Tensor, float]:
    """Mixup (Zhang et al. 2018, arXiv:1710.09412): each image blended with another of the batch.

    Returns (images, the other images' labels, the share of the image's own label). `alpha` 0 changes nothing.
    """
    if alpha == 0.0:
        return images, labels, 1.0
    generator = np.random.default_rng(seed)
    share = float(generator.beta(alpha, alpha))
    other = torch.from_numpy(generator.permutation(len(labels))).to(labels.device)
    return torch.lerp(images[other], images, share), labels[other], share


def mixed_cross_entropy(logits: Tensor, labels: Tensor, other_labels: Tensor, share: float, label_smoothing: float) -> Tensor:
    """Cross entropy, `share` of it against `labels` and the rest against `other_labels`; in float32 whatever the logits are."""
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    if share == 1.0:
        return loss
    return share * loss + (1.0 - share) * F.cross_entropy(logits, other_labels, label_smoothing=label_smoothing)
