"""The randomness of an optimiser step, its seed and mixup, as pure functions: the same seed and step give the same bits."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def step_seed(seed: int, step: int) -> int:
    """Return the seed of all randomness in optimiser step `step` (dropout, drop path, mixup), below 2**63."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def partners(n: int, alpha: float, seed: int) -> tuple[NDArray[np.int64], float]:
    """Return which image of a batch is blended into each, (n,), and the share that the image itself keeps."""
    generator = np.random.default_rng(seed)
    share = float(generator.beta(alpha, alpha))
    return generator.permutation(n), share


def mix(images: Tensor, targets: Tensor, alpha: float, seed: int) -> tuple[Tensor, Tensor, float]:
    """Apply mixup (Zhang et al. 2018, arXiv:1710.09412): blend each image with another of the batch.

    Args:
        alpha: of the beta distribution; 0 leaves the images as they are.

    Returns:
        The blended images, the targets of the images that were blended in, and the share of each image's own target.
    """
    if alpha == 0.0:
        return images, targets, 1.0
    order, share = partners(len(targets), alpha, seed)
    other = torch.from_numpy(order).to(targets.device)
    return torch.lerp(images[other], images, share), targets[other], share
