"""Decide whether training failed by its training loss, which separates a problem from an unusual but harmless figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.evaluation.diagnose.finding import Evidence
from finetune.evaluation.diagnose.records import RunRecords
from finetune.evaluation.diagnose.statistics import paired

CLEARLY = 3.0  # standard errors
LEARNT = 0.9  # share of the initial loss: a network whose final loss is above it has learnt next to nothing


@dataclass(frozen=True)
class Harm:
    """How training failed on the training sample: it diverged, made the loss worse, or hardly changed it."""

    kind: Literal["diverged", "worse", "stuck"]
    evidence: Evidence


def harm_of(records: RunRecords) -> Harm | None:
    """Return how training failed, by the loss on the fixed training sample; None if the loss developed as it should.

    A run that begins with the solved head must not end above its loss. A run that begins with an untrained head must end below.
    """
    if records.error is not None and "loss became" in str(records.error.get("message", "")):
        return Harm("diverged", Evidence("the run ended with", str(records.error["message"]).partition(". ")[0], "a finite loss"))
    first, last = records.first_sample, records.last_sample
    if first is None or last is None or max(records.samples) == 0:
        return None
    before, after = records.losses(first), records.losses(last)
    change = paired(first, last, before, after)
    if change is None:
        return None
    figures = f"{after.mean():.3g} at the end, {before.mean():.3g} before the first step ({len(before)} images)"
    if records.begins_with_solved_head:
        worse = change.z > CLEARLY and change.value > 0.1 * float(before.mean())
        return Harm("worse", Evidence("loss on a sample of training images", figures, "lower at the end")) if worse else None
    if float(after.mean()) > LEARNT * float(before.mean()):
        return Harm("stuck", Evidence("loss on a sample of training images", figures, f"below {LEARNT:.0%} of the start"))
    return None
