"""How long work tells its caller where it is. The caller decides whether that becomes a bar, a file or nothing. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """`done` of `total` `unit`s of one phase.

    Phases are runs (of a study), preparing, features, training, evaluating, exporting and registering.
    """

    phase: str
    done: int
    total: int
    unit: str
    values: Mapping[str, float] = field(default_factory=dict)
    message: str = ""


ProgressCallback = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """The callback that shows nothing."""
