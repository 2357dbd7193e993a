"""Degradation: training more stages gave a higher *training* error. Overfitting, in contrast, lowers it."""

from __future__ import annotations

from finetune.evaluation.diagnose.finding import CheckOutcome, Clear, Evidence, Finding, NotChecked, confidence
from finetune.evaluation.diagnose.records import RunRecords
from finetune.evaluation.diagnose.statistics import paired
from finetune.evaluation.predictions import Predictions

CLEARLY = 3.0  # standard errors, of the loss
HIGHER_ERROR = 2.0  # standard errors, of the error: label smoothing alone raises the loss
ADDED_ERROR = 0.02


class Degradation:
    """Compares with a shallower run, or else with the head solved on frozen features, on the same training images."""

    code = "degradation"
    title = "Degradation"
    explains = frozenset({"underfitting", "collapsed_classes"})

    def check(self, records: RunRecords) -> CheckOutcome:
        found = _reference(records)
        if isinstance(found, str):
            return NotChecked(self.code, self.title, found)
        name, reference = found
        sample = records.last_sample
        if sample is None:
            return NotChecked(self.code, self.title, "needs predictions on a sample of training images")
        loss = paired(reference, sample, records.losses(reference), records.losses(sample))
        score = paired(reference, sample, records.scores(reference), records.scores(sample))
        if loss is None or score is None:
            return NotChecked(self.code, self.title, f"{name} was measured on other training images")
        figure = f"training error {round(-100 * score.value, 1) + 0.0:+.1f} points against {name}"
        if loss.z < CLEARLY or -score.value < max(ADDED_ERROR, HIGHER_ERROR * score.error):
            return Clear(self.code, self.title, figure)
        metric = records.score
        of_reference, of_this = 1 - float(records.scores(reference).mean()), 1 - float(records.scores(sample).mean())
        return Finding(
            self.code,
            self.title,
            "problem",
            confidence(min((loss.z / CLEARLY) ** 2, (-score.value / max(ADDED_ERROR, HIGHER_ERROR * score.error)) ** 2)),
            f"it predicts more training images wrongly ({of_this:.1%}) than {name} ({of_reference:.1%}). A deeper one can copy "
            "that solution, so it is the optimisation that fails; the model is not overfitted",
            (
                Evidence("training error", f"{of_this:.1%}, {name} {of_reference:.1%} ({loss.n} images)", "at most as high"),
                Evidence(
                    "training loss",
                    f"{float(records.losses(sample).mean()):.3g}, {name} {float(records.losses(reference).mean()):.3g} "
                    f"(difference {loss.z:.1f} standard errors)",
                    "at most as high",
                ),
                *([Evidence(f"{metric.label} on val at the end", metric.text(records.last_val[1]))] if records.last_val else []),
            ),
            (
                "freeze more (method: partial or linear_probe), or begin with the solved head (method.warm_head: true)",
                "a lower learning rate with a longer warm-up",
                "for a network of your own: identity shortcuts (residual blocks), batch normalisation; finetune study depth "
                "shows what each does",
            ),
            "He et al. 2015, Deep residual learning for image recognition, arXiv:1512.03385, section 1",
        )


def _reference(records: RunRecords) -> tuple[str, Predictions] | str:
    """Return the name and training predictions of the run or head to compare with, or the reason why there is none."""
    if records.against is not None:
        answers = records.against.last_sample
        if answers is None:
            return f"{records.against.run.name} has no predictions on a sample of training images"
        return records.against.run.name, answers
    if not records.n_planned_steps:
        return "only the head was trained, which is the reference itself"
    if not records.begins_with_solved_head:
        return "there is nothing to compare with: give a shallower run (finetune diagnose RUN --against OTHER)"
    if records.first_sample is None or max(records.samples) == 0:
        return "no step has been taken yet"
    return "the solved head on frozen features", records.first_sample
