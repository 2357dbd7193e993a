"""Choose and draw the figures of a run's report. Import this module lazily: it imports matplotlib, which takes half a second."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.report import figures
from finetune.report.run_page import ReportInputs
from finetune.tasks import task_named


def draw_figures(records: Sequence[figures.Record], inputs: ReportInputs) -> dict[str, str]:
    """Return as SVG, by name, all figures for which the run has data; figures of an evaluation show the first one."""
    evaluation = next(iter(inputs.evaluations.values()))
    task = task_named(evaluation.task)
    candidates = {
        "learning_curves": figures.learning_curves(records, task, inputs.phases),
        "learning_rate": figures.learning_rate(records),
        "stage_signals": figures.stage_signals(records, inputs.stage_names),
        "l2_path": figures.l2_path(inputs.l2_path, inputs.l2, task.headline) if inputs.l2 is not None else None,
        "fold_scores": figures.fold_scores(inputs.folds) if inputs.folds else None,
        "confusion": figures.confusion_matrix(evaluation),
        "per_class": figures.per_class_bars(evaluation),
        "reliability": figures.reliability_diagram(evaluation, inputs.after),
        "accuracy_coverage": figures.accuracy_coverage(inputs.curve, inputs.calibration) if inputs.curve else None,
    }
    return {name: figures.to_svg(figure) for name, figure in candidates.items() if figure is not None}
