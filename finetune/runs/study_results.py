"""The results of a study that the run whose model it keeps must export and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from finetune.evaluation.evaluate import RunEvaluation
from finetune.evaluation.folds import CrossValidation
from finetune.evaluation.predictions import Predictions
from finetune.spec import JobSpec
from finetune.storage.rundir import RunDir


@dataclass(frozen=True)
class StudyResults:
    """Results of a study that belong in the bundle and the report of the run whose model it keeps.

    Args:
        evaluation: of further splits, with the temperature and thresholds to export with; None: the run's own are used.
        predictions: the tables of predictions that `evaluation` was computed from.
        notes: sentences that say which weights the figures belong to.
        summary: the study's summary, which replaces the run's.
        folds: the cross-validation, if the study is one.
        warnings: what the study found about the data.
        spec: the request of the study; None: the run is no part of one.
        study: the folder of the study.
        images: of the whole study, by use and class.
        cost: of the whole study.
    """

    evaluation: RunEvaluation | None = None
    predictions: Mapping[str, Predictions] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    summary: str = ""
    folds: CrossValidation | None = None
    warnings: tuple[str, ...] = ()
    spec: JobSpec | None = None
    study: RunDir | None = None
    images: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
