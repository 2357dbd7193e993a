"""Compute the order of the samples in an epoch and the number of its steps, by pure functions."""

from __future__ import annotations

import numpy as np


def steps_per_epoch(n_samples: int, batch_size: int) -> int:
    """Return the number of batches in one epoch.

    A last batch of a single image is left out, because batch normalisation cannot train on it. The shuffle leaves out another
    image in the next epoch.
    """
    full, rest = divmod(n_samples, batch_size)
    return full + (rest > 1 or (rest == 1 and full == 0))


def epoch_order(n_samples: int, seed: int, epoch: int, classes: np.ndarray | None = None) -> np.ndarray:
    """Return the order of the samples in one epoch, (n_samples,) int64.

    Args:
        classes: (n_samples,) if given, all classes occur equally often: the samples of a small class are repeated, equally often
            up to one time; of a large class only some occur, others in other epochs.
    """
    rng = np.random.default_rng([seed, epoch])
    if classes is None:
        return rng.permutation(n_samples)
    present = rng.permutation(np.unique(classes))
    drawn = []
    for number, label in enumerate(present):
        members = np.flatnonzero(classes == label)
        wanted = n_samples // len(present) + (number < n_samples % len(present))
        rounds = [rng.permutation(members) for _ in range(-(-wanted // len(members)))]
        drawn.append(np.concatenate(rounds)[:wanted])
    return rng.permutation(np.concatenate(drawn))


def times_before(order: np.ndarray) -> np.ndarray:
    """Return for each position how often its sample occurs earlier in the order, (n,) int64. Every occurrence is another view."""
    by_sample = np.argsort(order, kind="stable")
    ordered = order[by_sample]
    first = np.searchsorted(ordered, ordered)
    times = np.empty(len(order), np.int64)
    times[by_sample] = np.arange(len(order)) - first
    return times
