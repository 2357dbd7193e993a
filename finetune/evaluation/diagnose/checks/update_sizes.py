"""How far a step moves the weights of each stage, relative to their size: as measured, and as the recipe plans it."""

from __future__ import annotations

import math

import numpy as np

from finetune.evaluation.diagnose.records import HEAD, RunRecords


def planned_ratios(records: RunRecords) -> dict[str, float]:
    """Return for each stage the largest relative step that its learning rate allows.

    A step of Adam moves each weight by about the learning rate while gradients agree (Kingma & Ba 2014, arXiv:1412.6980, section
    2.1), so the whole stage by the rate times the square root of the number of weights.
    """
    peaks: dict[str, float] = {}
    for phase in records.phases:
        for index, rate in phase["stage_lr"].items():
            peaks[f"stage{index}"] = max(peaks.get(f"stage{index}", 0.0), float(rate))
    found = {}
    for stage, rate in peaks.items():
        norms = records.signal("weight_norm", stage)
        if norms and norms[0][1] > 0:
            found[stage] = rate * math.sqrt(records.stage_sizes.get(stage, 0)) / norms[0][1]
    return found


def measured_ratios(records: RunRecords) -> dict[str, list[float]]:
    """Return the relative steps that were measured of each stage; the very first has the rate of a warm-up's first step."""
    return {
        owner: [value for step, value in records.signal("update_ratio", owner) if step > 0]
        for owner in records.owners
        if owner != HEAD
    }


def moved(records: RunRecords) -> dict[str, float]:
    """Return about how far each stage moved in all: the median measured step times the number of steps, had all agreed."""
    return {owner: float(np.median(values)) * records.n_steps for owner, values in measured_ratios(records).items() if values}
