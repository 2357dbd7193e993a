"""Underfitting: a high error on training images, about as high as on held-out ones."""

from __future__ import annotations

import math

import numpy as np

from finetune.evaluation.diagnose.checks.overfitting import held_out_score
from finetune.evaluation.diagnose.finding import CheckOutcome, Clear, Evidence, Finding, NotChecked, confidence
from finetune.evaluation.diagnose.records import RunRecords
from finetune.evaluation.diagnose.statistics import mean_of, slope

TRAIN_ERROR = 0.15  # of the headline metric
SMALL_GAP = 0.05
CLEARLY = 2.0  # standard errors


class Underfitting:
    """Also reports whether the loss was still falling at the end, in which case more steps would help."""

    code = "underfitting"
    title = "Underfitting"
    explains: frozenset[str] = frozenset()

    def check(self, records: RunRecords) -> CheckOutcome:
        sample, held_out = records.last_sample, held_out_score(records)
        if sample is None or held_out is None:
            return NotChecked(self.code, self.title, "needs predictions on a sample of training images and on val or test")
        if not records.scores_are_headline:
            return NotChecked(self.code, self.title, "its limits are for images that have exactly one label")
        here, (split, there) = mean_of(records.scores(sample)), held_out
        train_error, gap = 1 - here.value, here.value - there.value
        figure = f"{train_error:.1%} of training images predicted wrongly"
        large_gap = gap > max(SMALL_GAP, CLEARLY * math.hypot(here.error, there.error))
        if train_error < TRAIN_ERROR + CLEARLY * here.error or large_gap:
            return Clear(self.code, self.title, figure)
        falling = still_falling(records)
        return Finding(
            self.code,
            self.title,
            "problem",
            confidence((train_error / TRAIN_ERROR) ** 2),
            f"{figure}, about as many as of {split}: the model does not fit what it was shown",
            (
                Evidence(f"error on {here.n} training images, as evaluated", f"{train_error:.1%}", f"below {TRAIN_ERROR:.0%}"),
                Evidence(f"error on {there.n} {split} images", f"{1 - there.value:.1%}"),
                Evidence("training loss in the last third of the epochs", "still falling" if falling else "level"),
            )[: 3 if records.n_planned_steps else 2],
            _advice(records, falling),
            "training error as the first thing to look at: Ng 2018, Machine Learning Yearning, chapters 20 to 27",
        )


def still_falling(records: RunRecords) -> bool:
    """Return whether the training loss falls clearly over the last third of the epochs."""
    values = np.array([value for _, value in records.curve("train/loss")])
    if len(values) < 3:
        return False
    third = values[-max(len(values) // 3, 3) :]
    trend = slope(third)
    return trend.z < -CLEARLY and -trend.value * len(third) > 0.02 * float(third.mean())


def _advice(records: RunRecords, falling: bool) -> tuple[str, ...]:
    if not records.n_planned_steps:
        return (
            "train some stages too (method: partial or full): a linear head on frozen features cannot tell these classes apart",
        )
    more = (
        "more epochs (hyperparameters.n_epochs)"
        if falling
        else "a higher learning rate (hyperparameters.learning_rate_multiplier: 3)"
    )
    return more, "train more stages (method: full), or take a larger backbone", "weaker augmentation, less weight decay"
