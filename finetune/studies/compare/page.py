"""Gather what the page of a comparison shows, and write it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from finetune.bundle.overlay import overlay_png
from finetune.bundle.predictor import Predictor
from finetune.data.dataset import Dataset, Sample
from finetune.errors import BundleError
from finetune.evaluation import predictions as tables
from finetune.evaluation.predictions import Predictions
from finetune.report.comparison import ComparisonPage, Disputed, render_comparison
from finetune.storage.files import write_atomic
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.studies.compare.result import Comparison
from finetune.studies.study import kept_run
from finetune.tasks import task_named

SHOWN_DISPUTED = 12


def write_comparison_page(found: Comparison, samples: Sequence[Sample], command: str) -> None:
    """Write ``report.html`` into the comparison's folder.

    Args:
        samples: the images that the arms were judged on; those that are missing here are not shown.
    """
    first_runs = {arm.name: RunDir(arm.runs[0]) for arm in found.arms}
    answers = {name: tables.read(run.predictions_of(found.split)) for name, run in first_runs.items()}
    reference = next(iter(answers.values()))
    task = task_named(reference.task)
    evaluated = np.array([n for n, _, _ in task.class_counts(task.judge(reference.logits, reference.labels))])
    page = ComparisonPage(
        document=found.to_dict(),
        metrics=task.metrics,
        curves={name: read_lines(kept_run(run).metrics) for name, run in first_runs.items()},
        disputed=_disputed(answers, first_runs, {sample.id: sample for sample in samples}),
        command=command,
        class_counts=evaluated.tolist(),
    )
    html = render_comparison(page)
    write_atomic(found.report, lambda stream: stream.write(html.encode("utf-8", "replace")))


def samples_of(dataset: Dataset, split: str) -> tuple[Sample, ...]:
    """Return the samples that a comparison is judged on: the test images, or with cross-validation all others."""
    return dataset.of("test") if split == "test" else dataset.samples


def _disputed(answers: dict[str, Predictions], runs: dict[str, RunDir], samples: dict[str, Sample]) -> list[Disputed]:
    """Return images that some arms answer rightly and others wrongly, those first where the wrong ones are surest."""
    task = task_named(next(iter(answers.values())).task)
    names = list(answers)
    probs = {name: task.probabilities(table.logits) for name, table in answers.items()}
    scores = np.stack([task.judge(table.logits, table.labels).score for table in answers.values()])  # (A, N)
    reference = answers[names[0]]
    sure = np.stack([probs[name].max(axis=1) for name in names])  # (A, N)
    wrongness = (sure * (scores < 1)).max(axis=0) * (scores.max(axis=0) == 1) * (scores.min(axis=0) < 1)
    order = [int(row) for row in np.argsort(-wrongness, kind="stable") if wrongness[row] > 0]
    predictors = {name: _predictor(run) for name, run in runs.items()}
    found: list[Disputed] = []
    for row in order:
        sample = samples.get(reference.ids[row])
        if sample is None or len(found) == SHOWN_DISPUTED:
            continue
        shown = []
        image = None
        for name in names:
            label = int(task.ranking(probs[name][row])[0])
            predictor = predictors[name]
            png = None
            if predictor is not None:
                image = sample.decode(predictor.manifest.preprocess.load)
                cam = predictor.run(image[None]).cam
                png = None if cam is None else overlay_png(image, cam[0])
            shown.append((name, reference.classes[label], float(probs[name][row, label]), png))
        if image is not None:
            true = task.label_text(reference.labels[row], reference.classes)
            found.append(Disputed(image, sample.id, true, tuple(shown)))
    return found


def _predictor(run: RunDir) -> Predictor | None:
    """Return the bundle of a run's kept weights, if it was exported."""
    bundle: Path = kept_run(run).bundle
    try:
        return Predictor.load(bundle) if bundle.exists() else None
    except BundleError:  # damaged since; the page goes without its maps
        return None
