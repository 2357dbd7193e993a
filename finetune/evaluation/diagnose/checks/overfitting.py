"""Overfitting: almost no mistakes on training images, many more on held-out ones.

A gap alone is a note: with few images every head on pretrained features has one, and no other model may be better. It is a
problem if training continued after the validation loss had begun to rise, or if the gap is very large.
"""

from __future__ import annotations

import math

import numpy as np

from finetune.evaluation.diagnose.checks.degradation import Degradation
from finetune.evaluation.diagnose.finding import CheckOutcome, Clear, Evidence, Finding, NotChecked, confidence
from finetune.evaluation.diagnose.records import RunRecords
from finetune.evaluation.diagnose.statistics import Mean, mean_of, ratio
from finetune.evaluation.evaluate import POOLED

GAP = 0.15  # of the headline metric, between training and held-out images
LARGE_GAP = 0.25
CLEARLY = 3.0  # standard errors
EVALUATIONS_LEFT, RISE = 3, 2.0  # evaluations after the lowest val loss; standard errors by which it has risen since
FITTED = 0.9  # least score on training images: below it the model does not even fit those


class Overfitting:
    """Compares the final score on the training sample with that on val, or on the only held-out split there is."""

    code = "overfitting"
    title = "Overfitting"
    explains = frozenset({"overconfidence"})

    def check(self, records: RunRecords) -> CheckOutcome:
        sample = records.last_sample
        held_out = held_out_score(records)
        if sample is None or held_out is None:
            return NotChecked(self.code, self.title, "needs predictions on a sample of training images and on val or test")
        split, there = held_out
        here = mean_of(records.scores(sample))
        gap = here.value - there.value
        error = math.hypot(here.error, there.error)
        figure = f"{records.score.label} {records.score.text(here.value)} on training images, "
        figure += f"{records.score.text(there.value)} on {split}"
        if isinstance(Degradation().check(records), Finding):
            return Clear(self.code, self.title, "the training error rose, which overfitting never does")
        if here.value < FITTED or gap < GAP or gap < CLEARLY * error:
            return Clear(self.code, self.title, figure)
        rise = _rise_of_val_loss(records)
        problem = gap >= LARGE_GAP or rise >= 1
        certain = min(gap / GAP, ratio(gap, CLEARLY * error)) ** 2
        return Finding(
            self.code,
            self.title,
            "problem" if problem else "note",
            confidence(certain),
            f"{figure}: it has learnt its {records.n_train:,} training images, and less about others",
            tuple(self._evidence(records, here, there, split, gap, error)),
            (
                "more training images, or stronger augmentation (augmentation: strong)",
                "train less of the network (method: linear_probe or partial), or for fewer epochs"
                if records.n_planned_steps
                else "a backbone whose features fit these images better (finetune compare --models)",
                "more weight decay, or dropout (model.head.dropout)",
            ),
            "gap between training and held-out error: Goodfellow, Bengio & Courville 2016, Deep Learning, section 5.2",
        )

    def _evidence(self, records: RunRecords, here: Mean, there: Mean, split: str, gap: float, error: float) -> list[Evidence]:
        found = [
            Evidence(f"{records.score.label} on {here.n} training images, as evaluated", records.score.text(here.value)),
            Evidence(f"{records.score.label} on {there.n} {split} images", records.score.text(there.value)),
            Evidence("gap", f"{100 * gap:.0f} ± {100 * error:.0f} points", f"below {100 * GAP:.0f}"),
        ]
        losses = [value for _, value in records.curve("val/loss")]
        if len(losses) > 1 and losses[-1] > min(losses):
            at = int(np.argmin(losses))
            found.append(
                Evidence("val loss", f"{min(losses):.3g} at evaluation {at + 1} of {len(losses)}, {losses[-1]:.3g} at the end")
            )
        return found


def _rise_of_val_loss(records: RunRecords) -> float:
    """Return the rise of the val loss since its minimum, in multiples of the threshold; 0 if the minimum was near the end."""
    losses = [value for _, value in records.curve("val/loss")]
    table = records.held_out.get("val")
    if table is None or not losses or not all(map(math.isfinite, losses)):
        return 0.0
    lowest = int(np.argmin(losses))
    if len(losses) - 1 - lowest < EVALUATIONS_LEFT:
        return 0.0
    return ratio(losses[-1] - losses[lowest], RISE * mean_of(records.losses(table)).error)


def held_out_score(records: RunRecords) -> tuple[str, Mean] | None:
    """Return the split and the mean score on it of the weights at the end of training.

    The score is that of the last evaluation on val. If no steps were taken, or nothing was chosen on val, the predictions of the
    weights that were kept are used.
    """
    n_val = int(records.resolved.get("dataset", {}).get("sizes", {}).get("val", 0))
    last = records.last_val
    if records.n_planned_steps and last is not None and n_val:
        p = min(max(last[1], 0.0), 1.0)
        q = (p * n_val + 2) / (n_val + 4)
        return "val", Mean(p, math.sqrt(q * (1 - q) / (n_val + 4)), n_val)
    for split in ("val", POOLED, "test"):
        if split in records.held_out:
            return split, mean_of(records.scores(records.held_out[split]))
    return None
