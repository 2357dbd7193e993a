"""A stage frozen by accident: no step changed a stage that the plan trains. Or the reverse: frozen weights changed."""

from __future__ import annotations

from finetune.evaluation.diagnose.finding import CheckOutcome, Clear, Evidence, Finding, NotChecked, confidence
from finetune.evaluation.diagnose.records import HEAD, RunRecords

MOVES = 1e-9  # ratio of step to weight norm that other stages must exceed before a stage at zero counts as not moved


class FrozenStage:
    """Compares the plan with the measured gradients and steps of every phase."""

    code = "frozen_stage"
    title = "A stage frozen by accident"
    explains = frozenset({"underfitting", "degradation"})

    def check(self, records: RunRecords) -> CheckOutcome:
        if changed := _frozen_that_changed(records):
            return changed
        if not records.parts:
            return NotChecked(self.code, self.title, "no steps were measured")
        still = _not_moved(records)
        if not still:
            return Clear(self.code, self.title, "every stage that should train moved")
        names = ", ".join(records.called(stage) for stage in still)
        return Finding(
            self.code,
            self.title,
            "problem",
            confidence(9.0),
            f"{names} should train by the recipe, and no step moved {'it' if len(still) == 1 else 'them'}",
            tuple(
                Evidence(f"steps of {records.called(stage)}", why, "above 0, as for other stages") for stage, why in still.items()
            ),
            (
                "look for code that sets requires_grad, or that leaves these parameters out of the optimiser",
                "if it should be frozen, say so in the request: method.train names the stages that train",
            ),
            "the plan in resolved.json against the steps in metrics.jsonl",
        )


def _not_moved(records: RunRecords) -> dict[str, str]:
    """Return the stages that a phase trains but none of its measured steps changed, each with the measured values as text."""
    found: dict[str, str] = {}
    first = 0
    for phase in records.phases:
        last = first + phase["n_steps"]
        of_phase = {
            part: [v for step, v in records.signal("update_ratio", part) if first <= step < last] for part in records.parts
        }
        gradients = {part: [v for step, v in records.signal("grad_norm", part) if first <= step < last] for part in records.parts}
        others_move = sum(max(values, default=0.0) > MOVES for part, values in of_phase.items() if part != HEAD)
        for index in phase["trainable"]:
            stage = f"stage{index}"
            if not records.stage_sizes.get(stage, 0) or not any(of_phase.values()):
                continue
            if not of_phase.get(stage):
                found[stage] = "no gradient was ever computed"
            elif others_move and max(of_phase[stage]) == 0 and max(gradients[stage]) > 0:
                found[stage] = f"0, with gradients of up to {max(gradients[stage]):.2g}"
        first = last
    return found


def _frozen_that_changed(records: RunRecords) -> Finding | None:
    frozen = (records.outcome or {}).get("frozen") or {}
    before, after = frozen.get("digest_before"), frozen.get("digest_after")
    if before == after:
        return None
    return Finding(
        FrozenStage.code,
        "A frozen stage that changed",
        "problem",
        confidence(99.0),
        f"the weights or statistics of {', '.join(frozen.get('stages', []))} changed, although they are frozen",
        (Evidence("sha256 of all that is frozen", f"{str(after)[:12]}… after training", f"{str(before)[:12]}…, as before"),),
        ("this is a defect of finetune: please report it",),
        "the sha256 of all frozen weights, which every run records",
    )
