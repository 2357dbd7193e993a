"""Exploding gradients: norms that grow during training, or from the top stage to the stem, or become infinite."""

from __future__ import annotations

import numpy as np

from finetune.evaluation.diagnose.checks.gradient_profile import profiles
from finetune.evaluation.diagnose.finding import CheckOutcome, Clear, Evidence, Finding, NotChecked, confidence
from finetune.evaluation.diagnose.harm import harm_of
from finetune.evaluation.diagnose.records import RunRecords

GROWTH = 30.0  # of a stage's gradient norm, from the first third of the steps to any later point
CLIPPED_AT = 1.0  # growth counts only above this norm: a head initialised with zeros begins with nearly no gradient
DECADES = 3.0  # powers of ten by which the gradients of lower stages exceed those of upper ones


class ExplodingGradients:
    """Reports a problem only together with harm (see `harm`): gradients are clipped, and Adam divides by their size."""

    code = "exploding_gradients"
    title = "Exploding gradients"
    explains = frozenset({"dead_units", "collapsed_classes", "degradation", "underfitting"})

    def check(self, records: RunRecords) -> CheckOutcome:
        harm = harm_of(records)
        if not records.parts and harm is None:
            return NotChecked(self.code, self.title, "no gradients were measured")
        part, growth = _largest_growth(records)
        found = profiles(records)
        fall = max((profile.fall for profile in found), default=0.0)
        strength = max(growth / GROWTH, (fall / DECADES) ** 2 if fall > 0 else 0.0)
        diverged = harm is not None and harm.kind == "diverged"
        if harm is None or (strength < 1 and not diverged):
            return Clear(self.code, self.title, f"gradient norms grow at most {growth:.2g} times" if part else "")
        grown = growth / GROWTH >= (fall / DECADES) ** 2
        what = (
            f"the gradient of {records.called(part)} grows {growth:,.0f} times"
            if grown and part
            else f"the lowest stages get {10**fall:,.0f} times the relative gradient of the highest"
        )
        if diverged and strength < 1:
            what = "the loss is no longer a number"
        return Finding(
            self.code,
            self.title,
            "problem",
            confidence(9.0 if diverged else strength),
            what,
            (
                Evidence("gradient norms", what, f"within {GROWTH:.0f} times, and {DECADES:.0f} decades between stages"),
                harm.evidence,
            ),
            (
                "a lower learning rate (hyperparameters.learning_rate_multiplier: 0.1) with a longer warm-up",
                "compute.precision: float32, if it was bfloat16",
                "for a network of your own: identity shortcuts whose blocks begin at zero, batch normalisation",
            ),
            "Pascanu, Mikolov & Bengio 2013, On the difficulty of training recurrent neural networks, arXiv:1211.5063",
        )


def _largest_growth(records: RunRecords) -> tuple[str, float]:
    """Return the stage whose gradient norm grows most relative to its median early in training, and the factor."""
    found = [("", 1.0)]
    for part in records.parts:
        values = np.array(
            [value for step, value in records.signal("grad_norm", part) if step > 0 or records.begins_with_solved_head]
        )
        if len(values) < 2:
            continue
        early = float(np.median(values[: max(len(values) // 3, 1)]))
        later = values[max(len(values) // 3, 1) :]
        if early > 0 and np.isfinite(later).any() and np.nanmax(later) > CLIPPED_AT:
            found.append((part, float(np.nanmax(later)) / early))
    return max(found, key=lambda one: one[1])
