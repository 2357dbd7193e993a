"""Progress reports of long operations. The caller decides whether to show a bar, write a file or ignore them. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """The progress of a run in one phase: `done` of `total` `unit`s.

    The phases of a run, as over HTTP, are runs (of a study), preparing, features, training, evaluating, exporting and
    registering. (`finetune.training.recipe.Phase` is a phase of training.)
    """

    phase: str
    done: int
    total: int
    unit: str
    values: Mapping[str, float] = field(default_factory=dict)
    message: str = ""


ProgressCallback = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Ignore the progress."""
