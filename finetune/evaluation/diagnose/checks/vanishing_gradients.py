"""Vanishing gradients: the gradients of the lower stages are at most a thousandth of those of the upper stages."""

from __future__ import annotations

from finetune.evaluation.diagnose.checks.gradient_profile import FEWEST_STAGES, Profile, profiles
from finetune.evaluation.diagnose.finding import CheckOutcome, Clear, Evidence, Finding, NotChecked, confidence
from finetune.evaluation.diagnose.harm import harm_of
from finetune.evaluation.diagnose.records import RunRecords

DECADES = 3.0


class VanishingGradients:
    """Compares with the pretrained network's gradients at step 0; reports a problem only together with harm (see `harm`)."""

    code = "vanishing_gradients"
    title = "Vanishing gradients"
    explains = frozenset({"dead_units", "collapsed_classes", "degradation", "underfitting"})

    def check(self, records: RunRecords) -> CheckOutcome:
        found = profiles(records)
        if not found:
            return NotChecked(self.code, self.title, f"needs measured gradients of at least {FEWEST_STAGES} stages")
        reference = found[0].rise if records.is_pretrained and records.begins_with_solved_head else 0.0
        worst = max(found, key=lambda profile: profile.rise)
        lost = worst.rise - reference
        harm = harm_of(records)
        figure = f"the relative gradient of the lowest stages is {10**-worst.rise:.1g} times the largest"
        if lost < DECADES or harm is None:
            return Clear(self.code, self.title, figure)
        return Finding(
            self.code,
            self.title,
            "problem",
            confidence((lost / DECADES) ** 2),
            f"at step {worst.step} {figure}, so they do not learn",
            (
                Evidence(
                    "gradient norm over weight norm, from the stem up", _text(records, worst), f"within {DECADES:.0f} decades"
                ),
                harm.evidence,
            ),
            (
                "for a network of your own: batch normalisation, identity shortcuts, He initialisation; finetune study depth "
                "shows what each does",
                "begin with pretrained weights, and with the solved head (method.warm_head: true)",
            ),
            "Glorot & Bengio 2010, Understanding the difficulty of training deep feedforward neural networks (AISTATS)",
        )


def _text(records: RunRecords, profile: Profile) -> str:
    n = len(profile.stages)
    shown = sorted({0, n // 4, n // 2, 3 * n // 4, n - 1})
    return ", ".join(f"{records.called(profile.stages[i])} {10 ** profile.decades[i]:.0e}" for i in shown)
