"""Learning rate too low: all steps together hardly changed the weights, and did not change the training loss."""

from __future__ import annotations

from finetune.evaluation.diagnose.checks.update_sizes import moved
from finetune.evaluation.diagnose.finding import CheckOutcome, Clear, Evidence, Finding, NotChecked, confidence
from finetune.evaluation.diagnose.records import RunRecords
from finetune.evaluation.diagnose.statistics import paired

MOVED = 1e-3  # relative change of the weights over all steps; healthy fine-tuning changes the upper stages by 0.01 and more
CHANGED = 0.02  # relative change of the training loss


class LearningRateLow:
    """Excludes runs that need no change: those whose solved head already has a training loss near zero."""

    code = "learning_rate_low"
    title = "Learning rate too low"
    explains = frozenset({"underfitting", "collapsed_classes"})

    def check(self, records: RunRecords) -> CheckOutcome:
        distances = moved(records)
        first, last = records.first_sample, records.last_sample
        if not distances or first is None or last is None or max(records.samples) == 0:
            return NotChecked(self.code, self.title, "no step after the first was measured")
        furthest = max(distances, key=lambda stage: distances[stage])
        before = records.losses(first)
        change = paired(first, last, before, records.losses(last))
        relative = 0.0 if change is None else abs(change.value) / max(float(before.mean()), 1e-12)
        figure = f"the largest change of a stage is {distances[furthest]:.1g} of its size"
        if distances[furthest] >= MOVED or relative > CHANGED:
            return Clear(self.code, self.title, figure)
        peak = max(phase["head_lr"] for phase in records.phases)
        return Finding(
            self.code,
            self.title,
            "problem",
            confidence(MOVED / max(distances[furthest], 1e-12)),
            f"in {records.n_steps:,} steps with a learning rate of {peak:.2g}, {figure}: as good as frozen",
            (
                Evidence(
                    f"change of {records.called(furthest)} over all steps", f"{distances[furthest]:.1g}", f"above {MOVED:g}"
                ),
                Evidence("learning rate of the head, at its peak", f"{peak:.2g}"),
                Evidence("training loss", f"changed by {relative:.2%}", f"by more than {CHANGED:.0%}"),
            ),
            (
                "leave hyperparameters.learning_rate at auto, or raise it tenfold until the training loss falls",
                "method: linear_probe, if nothing but the head should train: it gives the same model in seconds",
            ),
            "size of an update against size of the weights: Stanford CS231n notes, Neural networks part 3",
        )
