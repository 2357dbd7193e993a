"""The relative update size of each stage (step norm over weight norm), as measured and as planned by the recipe."""

from __future__ import annotations

import math

import numpy as np

from finetune.evaluation.diagnose.records import HEAD, RunRecords


def planned_ratios(records: RunRecords) -> dict[str, float]:
    """Return for each stage the largest relative step that its learning rate allows.

    A step of Adam changes each weight by about the learning rate while successive gradients agree (Kingma & Ba 2014,
    arXiv:1412.6980, section 2.1), so the norm of a stage's step is the rate times the square root of its number of weights.
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
    """Return the measured relative steps of each stage, without step 0, which has only the first rate of the warm-up."""
    return {
        part: [value for step, value in records.signal("update_ratio", part) if step > 0]
        for part in records.parts
        if part != HEAD
    }


def moved(records: RunRecords) -> dict[str, float]:
    """Return an upper estimate of each stage's total relative change: the median measured step times the number of steps."""
    return {part: float(np.median(values)) * records.n_steps for part, values in measured_ratios(records).items() if values}
