"""Overconfidence: the val loss rises while the val error does not, so only the probabilities get worse."""

from __future__ import annotations

import math

from finetune.evaluation.diagnose.finding import CheckOutcome, Clear, Evidence, Finding, NotChecked, confidence
from finetune.evaluation.diagnose.records import RunRecords
from finetune.evaluation.diagnose.statistics import mean_of, ratio

EVALUATIONS = 3  # after the lowest val loss
CLEARLY = 2.0  # standard errors


class Overconfidence:
    """Distinguished from overfitting by the val error: predictions are as accurate as before, but too confident."""

    code = "overconfidence"
    title = "Overconfidence"
    explains: frozenset[str] = frozenset()

    def check(self, records: RunRecords) -> CheckOutcome:
        losses = [value for _, value in records.curve("val/loss")]
        scores = [value for _, value in records.curve(f"val/{records.headline.key}")]
        table = records.held_out.get("val")
        if len(losses) <= EVALUATIONS or len(losses) != len(scores) or table is None:
            return NotChecked(self.code, self.title, f"needs at least {EVALUATIONS + 1} evaluations on val")
        lowest = min(range(len(losses)), key=lambda index: losses[index])
        rise, error = losses[-1] - losses[lowest], mean_of(records.losses(table)).error
        better = scores[-1] >= scores[lowest]
        if len(losses) - 1 - lowest < EVALUATIONS or rise <= CLEARLY * error or not better or not math.isfinite(rise):
            return Clear(self.code, self.title, f"val loss {losses[-1]:.3g} at the end, {losses[lowest]:.3g} at its lowest")
        return Finding(
            self.code,
            self.title,
            "note",
            confidence(ratio(rise, CLEARLY * error) ** 2),
            "the val loss rises, but no more val images are predicted wrongly: the probabilities are too high",
            (
                Evidence("val loss", f"{losses[lowest]:.3g} at its lowest, {losses[-1]:.3g} at the end", "about the same"),
                Evidence(
                    f"val {records.headline.label}",
                    f"{records.headline.text(scores[lowest])} then, {records.headline.text(scores[-1])} at the end",
                ),
            ),
            (
                "use the calibrated probabilities: the temperature in the bundle corrects this",
                "label smoothing (hyperparameters.label_smoothing: 0.1)",
            ),
            "Guo et al. 2017, On calibration of modern neural networks, arXiv:1706.04599",
        )
