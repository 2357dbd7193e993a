"""The one scorer: probabilities of the validation files, from whoever computed them, to top-1 accuracy and log loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_PROBABILITY = 1e-12  # so that one confident mistake does not make the mean infinite


class NotAnswered(Exception):
    """Probabilities that are not those of the validation files."""


@dataclass(frozen=True)
class Score:
    """Over `n_images` files; `nll` is the mean negative log of the true class's probability."""

    n_images: int
    top1: float
    nll: float


def score(wanted: Sequence[str], files: Sequence[str], classes: Sequence[str], probs: np.ndarray) -> Score:
    """Judge `probs` (N, C), rows as `files` and columns as `classes`, on the files `wanted`; a file's folder is its class.

    Raises:
        NotAnswered: a file is missing, doubled or unknown, or a row is no distribution.
    """
    if sorted(files) != sorted(wanted):
        raise NotAnswered(f"{len(wanted)} files were asked for, {len(set(files) & set(wanted))} of them are answered")
    if probs.shape != (len(files), len(classes)) or not np.allclose(probs.sum(axis=1), 1, atol=1e-3) or probs.min() < 0:
        raise NotAnswered(f"{probs.shape} values are not a distribution over {len(classes)} classes in each row")
    column = {name: index for index, name in enumerate(classes)}
    labels = np.array([column[name.split("/")[0]] for name in files])
    of_truth = probs[np.arange(len(files)), labels]
    return Score(
        len(files), float((probs.argmax(axis=1) == labels).mean()), float(-np.log(np.maximum(of_truth, LEAST_PROBABILITY)).mean())
    )
