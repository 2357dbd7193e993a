"""A finished run, for Python and notebooks: its metrics, predictions, report and model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from finetune.api.model import ImageLike, ImagePrediction, Model
from finetune.bundle.calibration import NO_OPTIONS, CertaintyOptions
from finetune.errors import InvalidInput
from finetune.evaluation import predictions as tables
from finetune.evaluation.diagnose import Diagnosis, diagnose, read_diagnosis
from finetune.evaluation.evaluate import MOST_INDEPENDENT_FIRST, Evaluation, RunEvaluation, read_evaluation
from finetune.evaluation.predictions import Predictions
from finetune.runs.outcome import Outcome
from finetune.storage.rundir import RunDir


class Run:
    """A finished run: its metrics, predictions, report and model."""

    def __init__(self, folder: Path) -> None:
        """Open the folder of a finished run.

        Raises:
            InvalidInput: it is not the folder of a finished run.
        """
        self._run = RunDir(Path(folder).absolute())
        if not self._run.outcome.exists():
            raise InvalidInput(f"{folder}: not the folder of a finished run (it has no outcome.json)")
        self.outcome = Outcome.read(self._run)

    @property
    def folder(self) -> Path:
        return self._run.root

    @property
    def metrics(self) -> Mapping[str, float]:
        """All metrics under ``split/name`` keys. Only ``test/…`` is unbiased: the epoch was chosen on val."""
        return self.outcome.metrics

    @property
    def cost(self) -> Mapping[str, float]:
        """The costs of the run and of the model; names end in their units."""
        return self.outcome.cost

    @property
    def report(self) -> Path:
        """The path of the run's report, one HTML file."""
        return self._run.report

    @property
    def bundle(self) -> Path:
        """The folder of the exported model.

        Raises:
            InvalidInput: the run exported no model, for example as a child of a study that was not kept.
        """
        if self.outcome.bundle is None:
            raise InvalidInput(f"{self.folder}: this run exported no model")
        return self.outcome.bundle

    @property
    def name(self) -> str | None:
        """The model version that the run registered, as ``name@version``; None if it registered none."""
        return None if self.outcome.model is None else f"{self.outcome.model}@{self.outcome.version}"

    @cached_property
    def model(self) -> Model:
        """The trained model, loaded on first use."""
        return Model(self.bundle)

    @cached_property
    def evaluation(self) -> RunEvaluation:
        """The evaluations of all splits: metrics with intervals, tables by class, confusion matrices."""
        return read_evaluation(self._run.evaluation)

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """The diagnosis of the run from its own records: `findings` with evidence, confidence and advice."""
        return read_diagnosis(self._run) or diagnose(self.folder)

    def predictions(self, split: str = "test") -> Predictions:
        """Return the table of predictions for a split.

        Raises:
            InvalidInput: the run was not evaluated on this split; the message lists the splits that it has.
        """
        path = self._run.predictions_of(split)
        if not path.exists():
            found = ", ".join(sorted(file.stem for file in self._run.predictions.glob("*.npz"))) or "none"
            raise InvalidInput(f"{self.folder} was not evaluated on {split!r}; it has {found}")
        return tables.read(path)

    def predict(self, image: ImageLike, options: CertaintyOptions = NO_OPTIONS) -> ImagePrediction:
        """Classify one image with the trained model; see `Model.predict`."""
        return self.model.predict(image, options)

    def __repr__(self) -> str:
        split, evaluation = self._most_independent()
        metric = evaluation.leading
        low, high = evaluation.intervals[metric.key]
        figure = f"{metric.label} {metric.text(evaluation.values[metric.key])}"
        return (
            f"<run {self.name or self.folder.name}, {self.outcome.carried_out}: {figure} on {evaluation.n:,} {split} images "
            f"({metric.text(low)} to {metric.text(high)})>"
        )

    def _repr_html_(self) -> str:
        from finetune.report.templates import render

        evaluations = self.evaluation.evaluations
        return render(
            "notebook_run.html",
            title=repr(self)[1:-1],
            splits=[split for split in MOST_INDEPENDENT_FIRST if split in evaluations],
            metrics=self._most_independent()[1].shown,
            evaluations=evaluations,
        )

    def _most_independent(self) -> tuple[str, Evaluation]:
        """Return the most independent split and its evaluation."""
        evaluations = self.evaluation.evaluations
        split = next(split for split in MOST_INDEPENDENT_FIRST if split in evaluations)
        return split, evaluations[split]
