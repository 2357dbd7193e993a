"""Cross-validation: carry out the whole request once for each fold, tested on other images each time, then once on all images.

Each fold does everything that the final run does, from the choices on its own val images to the refit. So the procedure that
makes the final model is what is evaluated, and no test image of a fold has influenced the fold's model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune.data.dataset import Dataset
from finetune.evaluation.evaluate import POOLED, evaluate
from finetune.evaluation.folds import CrossValidation, FoldScore
from finetune.evaluation.predictions import Predictions, concatenate, read
from finetune.runs.options import RunOptions
from finetune.runs.outcome import Outcome
from finetune.spec import JobSpec
from finetune.storage.rundir import RunDir
from finetune.studies.study import Child

FINAL = "final"


@dataclass(frozen=True)
class Folds:
    """The study of a cross-validation: all folds, then the final run on all images."""

    spec: JobSpec  # of each fold and of the final run, without `data.folds`
    datasets: tuple[Dataset, ...]  # one for each fold, with its own train, val and test splits
    whole: Dataset

    kind = "folds"

    @property
    def n_children(self) -> int:
        return len(self.datasets) + 1

    def next_children(self, finished: Mapping[str, Outcome]) -> Sequence[Child]:
        folds = [self._fold(number) for number in range(1, len(self.datasets) + 1)]
        if remaining := [child for child in folds if child.name not in finished]:
            return remaining
        return [] if FINAL in finished else [Child(FINAL, "final model", self.spec, RunOptions(goal="judged"), self.whole)]

    def _fold(self, number: int) -> Child:
        """Return the child of a fold, numbered from 1."""
        dataset = self.datasets[number - 1]
        used = {sample.id for sample in dataset.samples}
        return Child(
            name=fold_name(number),
            title=f"fold {number} of {len(self.datasets)}",
            spec=self.spec,
            options=RunOptions(goal="judged"),
            split=dataset,
            left_out=tuple(sample for sample in self.whole.samples if sample.id not in used),
        )


def fold_name(number: int) -> str:
    """Return the name of a fold's run; folds are numbered from 1."""
    return f"fold-{number}"


def pooled_predictions(run: RunDir, n_folds: int) -> Predictions:
    """Return one table with the predictions for all images of the folds, each from the fold that was tested on it."""
    tested = [run.child(fold_name(number)).predictions_of("test") for number in range(1, n_folds + 1)]
    return concatenate([read(path) for path in tested], POOLED)


def cross_validation(outcomes: Mapping[str, Outcome], pooled: Predictions, n_folds: int) -> CrossValidation:
    """Return the metrics of each fold and those of the pooled predictions."""
    scores = []
    for number in range(1, n_folds + 1):
        outcome = outcomes[fold_name(number)]
        scores.append(
            FoldScore(
                fold=number,
                n_train=outcome.n_train,
                n_test=int(outcome.metrics["test/n"]),
                metrics=outcome.metrics,
                summary=outcome.summary,
                seconds=outcome.cost["wall_seconds"],
            )
        )
    return CrossValidation(tuple(scores), evaluate(pooled))
