"""Gradient profiles: the gradient norm of each stage relative to its weight norm, from the stem up, at each measured step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.evaluation.diagnose.records import HEAD, RunRecords

FEWEST_STAGES = 3


@dataclass(frozen=True)
class Profile:
    """log10 of the ratio of gradient norm to weight norm of the trained stages, from the stem up.

    Stages with a gradient of exactly zero are left out: a dead layer blocks it, so it says nothing about the stages below.
    """

    step: int
    stages: tuple[str, ...]
    decades: tuple[float, ...]

    @property
    def rise(self) -> float:
        """The largest value minus the median of the lowest third of the stages, in decades (powers of ten)."""
        low = sorted(self.decades[: max(len(self.decades) // 3, 1)])
        return max(self.decades) - low[len(low) // 2]

    @property
    def fall(self) -> float:
        """The median of the lowest third of the stages minus the median of the highest third, in decades (powers of ten)."""
        third = max(len(self.decades) // 3, 1)
        low, high = sorted(self.decades[:third]), sorted(self.decades[-third:])
        return low[len(low) // 2] - high[len(high) // 2]


def profiles(records: RunRecords) -> list[Profile]:
    """Return the profiles in the order of steps; none if fewer than three stages train.

    Step 0 is left out for an untrained head: its weights are zero, so no gradient reaches the backbone.
    """
    parts = [part for part in records.parts if part != HEAD and records.stage_sizes.get(part, 1)]
    if len(parts) < FEWEST_STAGES:
        return []
    gradients = {part: dict(records.signal("grad_norm", part)) for part in parts}
    weights = {part: dict(records.signal("weight_norm", part)) for part in parts}
    found = []
    for step in sorted(set.intersection(*(set(points) for points in gradients.values()))):
        relative = [gradients[part][step] / max(weights[part].get(step, 1.0), 1e-12) for part in parts]
        if not records.begins_with_solved_head and step == 0:
            continue
        known = {part: value for part, value in zip(parts, relative, strict=True) if math.isfinite(value) and value > 0}
        if len(known) >= FEWEST_STAGES:
            found.append(Profile(int(step), tuple(known), tuple(math.log10(value) for value in known.values())))
    return found
