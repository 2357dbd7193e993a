"""Shuffled labels: the score on held-out images is at chance level, although the network and its training work."""

from __future__ import annotations

import math

from finetune.evaluation.diagnose.finding import CheckOutcome, Clear, Evidence, Finding, NotChecked, confidence
from finetune.evaluation.diagnose.records import RunRecords
from finetune.evaluation.diagnose.statistics import mean_of, share

CLEARLY = 3.0  # standard errors
RESOLVED = 0.12  # score above chance beyond which so few images cannot distinguish chance from a weak model
MEMORISED = 0.2  # score above chance on training images from which they count as memorised


class ShuffledLabels:
    """Tests whether the best head on pretrained features is at chance level, which labels that fit hardly ever allow.

    A network trained from scratch may simply not have learnt anything, so it must also have memorised the training images.
    """

    code = "shuffled_labels"
    title = "Labels that do not belong to their images"
    explains = frozenset({"overfitting", "underfitting", "degradation", "collapsed_classes", "overconfidence"})

    def check(self, records: RunRecords) -> CheckOutcome:
        held_out = records.most_independent
        if held_out is None or not records.scores_are_headline:
            return NotChecked(self.code, self.title, "needs predictions on val or test, with one label per image")
        split, table = held_out
        scores = records.scores(table)
        chance = records.task.chance(table.labels)
        found = share(round(float(scores.sum())), len(scores))
        upper = found.value + CLEARLY * found.error
        figure = (
            f"{records.headline.label} {records.headline.text(found.value)} on {split}; the most frequent label has {chance:.1%}"
        )
        started = _start_on_val(records)
        at_chance = found.value - chance < 2 * found.error and (started is None or started - chance < 2 * found.error)
        if not at_chance:
            return Clear(self.code, self.title, figure)
        if upper - chance > RESOLVED + CLEARLY * found.error:
            return NotChecked(self.code, self.title, f"{len(scores)} images are too few to tell chance from a weak model")
        sample = records.last_sample
        learnt = None if sample is None else mean_of(records.scores(sample)).value - records.task.chance(sample.labels)
        if not (records.is_pretrained and records.begins_with_solved_head) and (learnt is None or learnt < MEMORISED):
            return Clear(self.code, self.title, "the network has learnt nothing, not even the training images")
        margin = (CLEARLY * found.error) / max(abs(found.value - chance), found.error)
        return Finding(
            self.code,
            self.title,
            "problem",
            confidence(max(margin, 1.0) ** 2 * (1 + math.log10(max(len(scores), 10)))),
            f"{figure}: the features of the network say nothing about these labels",
            (
                Evidence(
                    f"{records.headline.label} on {found.n} {split} images",
                    records.headline.text(found.value),
                    f"above {chance:.1%}",
                ),
                *(
                    []
                    if started is None
                    else [Evidence("of the solved head on val", records.headline.text(started), "above chance")]
                ),
                *([] if learnt is None else [Evidence("on training images, above chance", f"{100 * learnt:+.0f} points")]),
            ),
            (
                "open some images beside their labels; look for a sorted list joined to an unsorted one, or a label file of "
                "another version",
                "if the labels are right, these classes differ in nothing that a photograph shows at this size",
            ),
            "networks learn random labels by heart and generalise at chance: Zhang et al. 2016, arXiv:1611.03530",
        )


def _start_on_val(records: RunRecords) -> float | None:
    """Return the headline metric of the solved head on val before the first step, or None if there was no solved head."""
    curve = records.curve(f"val/{records.headline.key}")
    return curve[0][1] if curve and records.begins_with_solved_head else None
