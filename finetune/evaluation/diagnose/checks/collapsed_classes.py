"""Collapsed classes: classes that the model never or hardly ever predicts, although the split holds images of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from finetune.evaluation.diagnose.checks.underfitting import still_falling
from finetune.evaluation.diagnose.finding import CheckOutcome, Clear, Evidence, Finding, NotChecked, confidence
from finetune.evaluation.diagnose.harm import harm_of
from finetune.evaluation.diagnose.records import RunRecords
from finetune.evaluation.predictions import Predictions
from finetune.messages import natural_list

FEWEST_IMAGES = 5  # of a class
RARE = 0.1  # predictions of a class, relative to its number of images
UNLIKELY = math.log(1e-3)
LEAST_RECALL = 0.2  # of the other classes: in a model that recognises nothing no class has collapsed
FITTED_RECALL = 0.85  # of the other classes: below it, while the loss still falls, the missing classes may yet be learnt


class CollapsedClasses:
    """Tests how probable so few correct predictions of a class are, given the recall of the other classes."""

    code = "collapsed_classes"
    title = "Collapsed classes"
    explains = frozenset({"underfitting"})

    def check(self, records: RunRecords) -> CheckOutcome:
        held_out = records.most_independent
        if held_out is None:
            return NotChecked(self.code, self.title, "needs predictions on val or test")
        split, table = held_out
        rows = table.image_results()
        confusion = records.task.confusion(rows)
        if confusion is None:
            return self._check_labels(records, split, table, records.task.class_counts(rows))
        return self._check_classes(records, split, table, np.array(confusion))

    def _check_classes(self, records: RunRecords, split: str, table: Predictions, confusion: NDArray[np.int64]) -> CheckOutcome:
        """Look for classes that are predicted much more rarely than images have them, given the confusion matrix (C, C)."""
        harm = harm_of(records)
        if harm is not None and harm.kind != "worse":
            return NotChecked(self.code, self.title, "the network has learnt next to nothing, so it cannot have lost a class")
        true, n_predicted, right = confusion.sum(axis=1), confusion.sum(axis=0), np.diagonal(confusion)
        rare = (true >= FEWEST_IMAGES) & (n_predicted <= RARE * true)
        others = ~rare & (true > 0)
        recall = float(right[others].sum() / max(true[others].sum(), 1))
        lost = [index for index in np.flatnonzero(rare) if int(true[index]) * math.log1p(-min(recall, 0.99)) < UNLIKELY]
        figure = f"{int((n_predicted > 0).sum())} of {int((true > 0).sum())} classes are predicted"
        if not lost or (recall < LEAST_RECALL and len(lost) < len(true) - 1):
            few = [] if lost else [table.classes[index] for index in np.flatnonzero((true > 0) & (n_predicted == 0))]
            if few:
                figure += f"; there are too few images of {natural_list(few)} to tell"
            return Clear(self.code, self.title, figure)
        if recall < FITTED_RECALL and still_falling(records):
            return Clear(self.code, self.title, f"{figure}; the training loss is still falling, so the others may yet be learnt")
        names = natural_list([table.classes[index] for index in lost])
        return Finding(
            self.code,
            self.title,
            "problem",
            confidence(2.0 * float(true[lost].sum()) * math.log1p(-min(recall, 0.99)) / UNLIKELY / max(len(lost), 1)),
            f"it hardly ever predicts {names}, although {int(true[lost].sum())} of {len(table)} {split} images show "
            f"{'it' if len(lost) == 1 else 'them'}",
            (
                *(
                    Evidence(
                        f"predictions of {table.classes[index]}",
                        f"{n_predicted[index]} for {true[index]} images",
                        "about as many as images",
                    )
                    for index in lost[:5]
                ),
                Evidence("recall of the other classes", f"{recall:.0%}"),
                Evidence("training images of these classes", self._trained_on(records, [table.classes[index] for index in lost])),
            ),
            (
                "see whether the training labels of these classes are what they should be",
                "more images of these classes, or equal weights for all classes, where they are few",
            ),
            "per-class recall and its mean: Brodersen et al. 2010, The balanced accuracy and its posterior distribution",
        )

    def _check_labels(
        self, records: RunRecords, split: str, table: Predictions, counts: Sequence[tuple[int, int, int]]
    ) -> CheckOutcome:
        """Look for labels that no image is given, although images have them, where an image may have any number of labels.

        Args:
            counts: as `Task.class_counts` returns them.
        """
        true, given, _ = np.array(counts).T
        figure = f"{int(((given > 0) & (true > 0)).sum())} of {int((true > 0).sum())} labels are given"
        lost = [int(index) for index in np.flatnonzero((given == 0) & (true >= FEWEST_IMAGES))]
        if not lost:
            return Clear(self.code, self.title, figure)
        names = [table.classes[index] for index in lost]
        return Finding(
            self.code,
            self.title,
            "problem",
            confidence(float(true[lost].max()) / FEWEST_IMAGES),
            f"it gives no {split} image the label {natural_list(names)}, although "
            f"{natural_list([f'{true[index]:,}' for index in lost])} of {len(table):,} have {'it' if len(lost) == 1 else 'them'}",
            (
                *(
                    Evidence(f"images given {table.classes[index]}", f"0, where {true[index]:,} have it", "about as many")
                    for index in lost[:5]
                ),
                Evidence("training images with these labels", self._trained_on(records, names)),
            ),
            (
                "see whether the training labels are what they should be",
                "more images with these labels, or weights for them (data.class_weights: balanced), where they are few",
            ),
            "a label that is never given has recall and F1 of 0, which an average over labels hides",
        )

    def _trained_on(self, records: RunRecords, names: list[str]) -> str:
        counts = records.resolved["dataset"]["counts"].get("train", {})
        return ", ".join(f"{name} {counts.get(name, 0):,}" for name in names[:5])
