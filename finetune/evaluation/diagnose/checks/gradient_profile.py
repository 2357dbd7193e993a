"""The gradients of the stages relative to their weights, from the stem to the top, at every point where they were measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.evaluation.diagnose.records import HEAD, RunRecords

FEWEST_STAGES = 3


@dataclass(frozen=True)
class Profile:
    """log10 of gradient norm over weight norm of trained stages, from the stem up.

    A gradient of exactly zero is left out: something blocks it, a layer that died, and nothing is known of what is below.
    """

    step: int
    stages: tuple[str, ...]
    decades: tuple[float, ...]

    @property
    def rise(self) -> float:
        """How many decades more gradient the stage with the most gets than the lowest third of the stages does."""
        low = sorted(self.decades[: max(len(self.decades) // 3, 1)])
        return max(self.decades) - low[len(low) // 2]

    @property
    def fall(self) -> float:
        """How many decades more gradient the lowest third of the stages gets than the highest third does."""
        third = max(len(self.decades) // 3, 1)
        low, high = sorted(self.decades[:third]), sorted(self.decades[-third:])
        return low[len(low) // 2] - high[len(high) // 2]


def profiles(records: RunRecords) -> list[Profile]:
    """Return the profiles in the order of steps; none where fewer than three stages train.

    With an untrained head, which begins at zero, no gradient passes it at step 0; that point is left out.
    """
    owners = [owner for owner in records.owners if owner != HEAD and records.stage_sizes.get(owner, 1)]
    if len(owners) < FEWEST_STAGES:
        return []
    gradients = {owner: dict(records.signal("grad_norm", owner)) for owner in owners}
    weights = {owner: dict(records.signal("weight_norm", owner)) for owner in owners}
    found = []
    for step in sorted(set.intersection(*(set(points) for points in gradients.values()))):
        relative = [gradients[owner][step] / max(weights[owner].get(step, 1.0), 1e-12) for owner in owners]
        if not records.begins_with_solved_head and step == 0:
            continue
        known = {owner: value for owner, value in zip(owners, relative, strict=True) if math.isfinite(value) and value > 0}
        if len(known) >= FEWEST_STAGES:
            found.append(Profile(int(step), tuple(known), tuple(math.log10(value) for value in known.values())))
    return found
