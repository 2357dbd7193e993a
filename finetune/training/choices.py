"""The choices that a run made on its validation images. A refit uses them, because it trains on those images. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Choices:
    """What was chosen on the validation images. A run that is given these choices evaluates nothing while it trains.

    Args:
        l2: L2 penalty that the head was solved with; None if it was not solved.
        n_epochs: number of epochs after which the weights were best; the learning rate schedule still spans all epochs.
        share: share of the fine-tuned weights in the interpolation with the weights at the start of training; 1: no
            interpolation.
        recalibrated: whether the running statistics of batch normalisation were estimated anew after training.
        numerics: device, precision, memory layout and threads of the steps; None if no steps were taken.
    """

    l2: float | None = None
    n_epochs: int = 0
    share: float = 1.0
    recalibrated: bool = False
    numerics: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Choices:
        return cls(**given)
