"""What a run chose on its validation images, for a run of the same request that trains on those too. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Choices:
    """The results of choosing; a run that is given them evaluates nothing while it trains.

    Args:
        l2: strength that the head was solved with; None where it was not solved.
        n_epochs: after how many the weights were kept; the learning rate schedule is that of all epochs.
        share: of the fine-tuned weights in those that were kept; the rest is the start's.
        recalibrated: whether running statistics were estimated anew.
        numerics: device, precision, memory layout and threads of the steps; empty where none were taken.
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
