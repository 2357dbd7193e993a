"""Leakage: held-out images that are copies of training images, so that the metrics overestimate the model."""

from __future__ import annotations

from finetune.evaluation.diagnose.finding import CheckOutcome, Clear, Evidence, Finding, NotChecked, confidence
from finetune.evaluation.diagnose.records import HELD_OUT_SPLITS, Neighbour, RunRecords
from finetune.evaluation.diagnose.statistics import log_binomial_tail

TWIN = 0.25  # a copy has at most this ratio of the distances to its nearest and fifth nearest training images
ORDINARY_SHARE = 0.01  # of held-out images that have such a neighbour by chance: digits of one writer, one object twice
UNLIKELY = -9.2  # natural logarithm of 1e-4
FEWEST_TRAINING_IMAGES = 50
SHOWN = 3


class Leakage:
    """Compares frozen features, so that it also finds copies that were scaled, cropped or compressed again.

    Images that were compared pixel by pixel and found to be copies (``near_copies.json``) count as well.
    """

    code = "leakage"
    title = "Leakage between splits"
    explains: frozenset[str] = frozenset()

    def check(self, records: RunRecords) -> CheckOutcome:
        by_split = {split: [one for one in records.neighbours if one.split == split] for split in HELD_OUT_SPLITS}
        known = {split: found for split, found in by_split.items() if found}
        if not known:
            return NotChecked(
                self.code, self.title, "needs the frozen features of training images, which this method does not compute"
            )
        if records.n_train < FEWEST_TRAINING_IMAGES:
            return NotChecked(self.code, self.title, f"needs at least {FEWEST_TRAINING_IMAGES} training images to compare with")
        twins = {
            split: [one for one in found if one.ratio < TWIN or (split, one.id) in records.copies]
            for split, found in known.items()
        }
        chances = {split: log_binomial_tail(len(found), len(twins[split]), ORDINARY_SHARE) for split, found in known.items()}
        worst = min(chances, key=lambda split: chances[split])
        n, n_twins = len(known[worst]), len(twins[worst])
        figure = f"{n_twins} of {n} {worst} images have a near duplicate among the training images"
        if chances[worst] > UNLIKELY or n_twins < SHOWN:
            return Clear(self.code, self.title, figure)
        return Finding(
            self.code,
            self.title,
            "problem",
            confidence(chances[worst] / UNLIKELY),
            f"{figure}: metrics on {worst} overestimate the model",
            tuple(self._evidence(records, worst, known[worst], twins[worst])),
            (
                "keep copies on one side: remove them, or give the images of one object or one scene one group; finetune check "
                "DATA --fix corrected.csv writes such groups, and --set data.manifest=corrected.csv uses them",
                f"measurements/{records.run.neighbours.name} lists every {worst} image with its nearest training image; do not "
                "rely on any metric before the copies are removed",
            ),
            "near-duplicates between train and test: Barz & Denzler 2020, arXiv:1902.00423; ratio of distances: Lowe 2004",
        )

    def _evidence(self, records: RunRecords, split: str, all_of: list[Neighbour], twins: list[Neighbour]) -> list[Evidence]:
        found = [
            Evidence(
                f"{split} images that are near duplicates, or much nearer to one training image than to four others",
                f"{len(twins)} of {len(all_of)}",
                f"about {ORDINARY_SHARE:.0%}",
            )
        ]
        table = records.held_out.get(split)
        if table is not None:
            scores = dict(zip(table.ids, records.scores(table), strict=True))
            has_twin = {one.id for one in twins}
            with_twin = [scores[one.id] for one in all_of if one.id in scores and one.id in has_twin]
            without = [scores[one.id] for one in all_of if one.id in scores and one.id not in has_twin]
            if with_twin and without:
                means = [records.score.text(float(sum(part) / len(part))) for part in (with_twin, without)]
                found.append(Evidence(f"{records.score.label} on those, and on the others", f"{means[0]} and {means[1]}"))
        nearest = sorted(twins, key=lambda one: one.ratio)[:SHOWN]
        found += [Evidence(one.id, f"is {one.nearest} ({one.nearest_label})") for one in nearest]
        return found
