"""Collect the content of a comparison's page, and write the page."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.overlay import overlay_png
from finetune.bundle.predictor import Predictor
from finetune.data.dataset import Sample
from finetune.errors import BundleError, ImageError
from finetune.evaluation.predictions import Predictions
from finetune.report.comparison_page import ComparisonPage, Disputed, render_comparison
from finetune.storage.files import write_atomic
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir, kept_run
from finetune.studies.compare.result import ArmRuns, Comparison
from finetune.tasks import task_named

SHOWN_DISPUTED = 12


def write_comparison_page(found: Comparison, arms: Sequence[ArmRuns], samples: Mapping[str, Sample], command: str) -> None:
    """Write ``report.html`` into the comparison's folder.

    Args:
        arms: the compared runs.
        samples: the images by their ids in the predictions of `arms`; images that are missing or have changed are not shown.
        command: that the page shows for repeating the comparison.
    """
    first_runs = {arm.name: RunDir(arm.runs[0]) for arm in found.arms}
    answers = {arm.predictions.name: arm.predictions.runs[0] for arm in arms}
    reference = next(iter(answers.values()))
    task = task_named(reference.task)
    evaluated = np.array([n for n, _, _ in task.class_counts(reference.image_results())])
    page = ComparisonPage(
        document=found.to_dict(),
        metrics=task.metrics,
        curves={name: read_lines(kept_run(run).metrics) for name, run in first_runs.items()},
        disputed=_disputed(answers, first_runs, samples),
        command=command,
        class_counts=evaluated.tolist(),
    )
    html = render_comparison(page)
    write_atomic(found.report, lambda stream: stream.write(html.encode("utf-8", "replace")))


def _disputed(answers: Mapping[str, Predictions], runs: Mapping[str, RunDir], samples: Mapping[str, Sample]) -> list[Disputed]:
    """Return images that some arms predict correctly and others wrongly, in order of the highest confidence of a wrong one."""
    task = task_named(next(iter(answers.values())).task)
    names = list(answers)
    results = {name: table.image_results() for name, table in answers.items()}
    confidence = {name: task.predicted_and_true_probabilities(rows)[0] for name, rows in results.items()}
    scores = np.stack([rows.score for rows in results.values()])  # (A, N)
    reference = answers[names[0]]
    sure = np.stack([confidence[name] for name in names])  # (A, N)
    wrongness = (sure * (scores < 1)).max(axis=0) * (scores.max(axis=0) == 1) * (scores.min(axis=0) < 1)
    order = [int(row) for row in np.argsort(-wrongness, kind="stable") if wrongness[row] > 0]
    predictors = {name: _predictor(run) for name, run in runs.items()}
    found: list[Disputed] = []
    for row in order:
        if len(found) == SHOWN_DISPUTED:
            break
        sample = samples.get(reference.ids[row])
        if sample is None or not _is_the_same(sample, reference.sha256[row]):
            continue
        shown = []
        image = None
        for name in names:
            predictor = predictors[name]
            png = None
            if predictor is not None:
                image = sample.decode(predictor.manifest.preprocess.load)
                cam = predictor.run(image[None]).cam
                png = None if cam is None else overlay_png(image, cam[0])
            answer = task.prediction_text(results[name], row, reference.classes)
            shown.append((name, answer, float(confidence[name][row]), png))
        if image is not None:
            true = task.label_text(reference.labels[row], reference.classes)
            found.append(Disputed(image, sample.id, true, tuple(shown)))
    return found


def _is_the_same(sample: Sample, sha256: NDArray[np.uint8]) -> bool:
    """Return whether an image file still has the bytes that were evaluated."""
    try:
        return hashlib.sha256(sample.read()).digest() == sha256.tobytes()
    except ImageError:
        return False


def _predictor(run: RunDir) -> Predictor | None:
    """Return a predictor of a run's bundle; None if the run was not exported, or if the bundle is damaged."""
    bundle: Path = kept_run(run).bundle
    try:
        return Predictor.load(bundle) if bundle.exists() else None
    except BundleError:  # it was damaged after the export; the page then has no activation maps of this run
        return None
