"""Dead units: channels whose activation varied between images before the first step and is now the same for all images."""

from __future__ import annotations

from finetune.evaluation.diagnose.finding import CheckOutcome, Clear, Evidence, Finding, NotChecked, confidence
from finetune.evaluation.diagnose.harm import harm_of
from finetune.evaluation.diagnose.records import Curve, RunRecords

DIED = 0.3  # of the channels of one layer, since the first step


class DeadUnits:
    """Counts only channels that became constant during training: pretrained networks may have some (padding, pruning)."""

    code = "dead_units"
    title = "Dead units"
    explains = frozenset({"collapsed_classes", "degradation", "underfitting"})

    def check(self, records: RunRecords) -> CheckOutcome:
        curves = _curves(records)
        if not curves:
            return NotChecked(self.code, self.title, "activations were not measured at two points of training")
        died = {part: curve[-1][1] - curve[0][1] for part, curve in curves.items()}
        worst = max(died, key=lambda part: died[part])
        figure = f"at most {max(died[worst], 0.0):.0%} of a layer's channels died"
        if died[worst] < DIED:
            return Clear(self.code, self.title, figure)
        harm = harm_of(records)
        others = sum(share >= DIED for share in died.values()) - 1
        also = f", and so many in {others} other stage{'s' if others > 1 else ''}" if others else ""
        return Finding(
            self.code,
            self.title,
            "problem" if harm else "note",
            confidence((died[worst] / DIED) ** 2),
            f"{died[worst]:.0%} of the channels of a layer in {records.called(worst)} have died since the first step{also}",
            (
                Evidence(
                    f"constant channels in the worst layer of {records.called(worst)}",
                    ", ".join(f"{value:.0%} after step {step:.0f}" for step, value in curves[worst]),
                    f"less than {DIED:.0%} more than at the start",
                ),
                *([harm.evidence] if harm else []),
            ),
            (
                "a lower learning rate, with a longer warm-up (hyperparameters.warmup_fraction)",
                "for a network of your own: leaky or smooth activations (LeakyReLU, GELU), batch normalisation before them",
            ),
            "Lu et al. 2019, Dying ReLU and initialization, arXiv:1903.06733",
        )


def _curves(records: RunRecords) -> dict[str, Curve]:
    """Return by stage the share of constant channels in its worst layer over the steps, if measured at least twice."""
    found = {part: records.signal("dead_channels", part) for part in records.stage_names}
    return {part: curve for part, curve in found.items() if len(curve) > 1}
