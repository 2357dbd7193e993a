"""Learning rate too high: single steps change the weights by a large share of their norm, and the training loss got worse."""

from __future__ import annotations

from finetune.evaluation.diagnose.checks.update_sizes import measured_ratios, planned_ratios
from finetune.evaluation.diagnose.finding import CheckOutcome, Clear, Evidence, Finding, NotChecked, confidence
from finetune.evaluation.diagnose.harm import harm_of
from finetune.evaluation.diagnose.records import RunRecords

RATIO = 0.07  # step norm over weight norm; healthy fine-tuning stays below 0.02, training from scratch below 0.04


class LearningRateHigh:
    """Requires both large steps and harm: some networks with batch normalisation tolerate very large steps."""

    code = "learning_rate_high"
    title = "Learning rate too high"
    explains = frozenset(
        {"vanishing_gradients", "exploding_gradients", "dead_units", "collapsed_classes", "degradation", "underfitting"}
    )

    def check(self, records: RunRecords) -> CheckOutcome:
        planned = planned_ratios(records)
        if not planned:
            return NotChecked(self.code, self.title, "no steps were measured")
        measured = {part: max(values, default=0.0) for part, values in measured_ratios(records).items()}
        largest = {stage: max(ratio, measured.get(stage, 0.0)) for stage, ratio in planned.items()}
        worst = max(largest, key=lambda stage: largest[stage])
        figure = f"a step changes a stage by at most {largest[worst]:.2g} of its size"
        harm = harm_of(records)
        if largest[worst] < RATIO or harm is None:
            return Clear(self.code, self.title, figure)
        peak = max(phase["head_lr"] for phase in records.phases)
        return Finding(
            self.code,
            self.title,
            "problem",
            confidence((largest[worst] / RATIO) ** 2),
            f"with a learning rate of {peak:.2g} one step may move {records.called(worst)} by {largest[worst]:.0%} of its size, "
            "and training undid more than it learnt",
            (
                Evidence(f"step over weights, {records.called(worst)}", f"{largest[worst]:.2g}", f"below {RATIO:g}"),
                Evidence("learning rate of the head, at its peak", f"{peak:.2g}"),
                harm.evidence,
            ),
            (
                "hyperparameters.learning_rate_multiplier: 0.1, and again if need be",
                "a longer warm-up (hyperparameters.warmup_fraction: 0.3)",
            ),
            "size of an update against size of the weights: Stanford CS231n notes, Neural networks part 3; You et al. 2017, "
            "arXiv:1708.03888",
        )
