"""The page of a run, ``report.html``, one self-contained file: what was trained, how good the model is, and how reliable that is.

It is made from plain values, without torch, specs or bundles. This module formats the numbers; the template ``run.html`` lays
them out, escapes all text, embeds the images and has no script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.bundle.calibration import Calibration
from finetune.bundle.card import checked_sentences
from finetune.evaluation.calibrate import AccuracyCoverage
from finetune.evaluation.diagnose import Diagnosis
from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.folds import CrossValidation
from finetune.messages import encodable, natural_list
from finetune.metrics import Metric
from finetune.metrics.temperature import Temperature
from finetune.report.pictures import data_uri, thumbnail
from finetune.report.templates import render
from finetune.report.text import SHOWN_CLASSES, cost_label, cost_text, flat, value_text
from finetune.storage.files import write_atomic
from finetune.storage.rundir import RunDir
from finetune.tasks import task_named

_MAX_PAIRS = 12
_NAMED_ABSENT = 10
_FITTING_CLASSES = 50  # a larger confusion matrix is shown in full size with scroll bars

_SPLIT_TITLES = {
    "cv": "cross-validation",
    "cv_unseen": "cross-validation, without near duplicates of training images",
    "val": "val (on which the weights were chosen)",
    "test_unseen": "test, without images that were trained on",
    "val_unseen": "val, without images that were trained on",
}
_CARD_METRICS = ("micro_f1", "macro_f1", "mean_per_class_accuracy", "exact_match", "ece")
_FOLD_METRICS = ("macro_f1", "mean_per_class_accuracy", "exact_match", "loss")  # an ECE of few images is biased
_TRAINING_FIGURES = ("l2_path", "learning_curves", "stage_signals", "learning_rate")
_CAPTIONS = {
    "l2_path": "The head is solved without optimiser steps; its L2 strength is the one with the lowest held-out loss.",
    "learning_curves": "The metric that chooses the epoch, and the loss, by epoch. The ring marks the epoch chosen on val.",
    "stage_signals": "Per stage, running medians: gradient norm before clipping, and step norm over weight norm.",
    "learning_rate": "Learning rate by step.",
    "fold_scores": "Each fold on what it held out, the mean over folds with its 95 % interval, and all predictions pooled.",
    "confusion": "Rows are true classes, columns what was predicted; shade is the share of the row.",
    "reliability": "Below the dashed line the model is overconfident. Small bins are noisy.",
    "accuracy_coverage": "Accuracy if only the most confident predictions are given: the fewer, the more accurate.",
}


@dataclass(frozen=True)
class ShownMistake:
    """A wrongly predicted image for the gallery."""

    image: NDArray[np.uint8]  # (h, w, 3) RGB, as preprocessed for the model
    file: str
    true: str
    predicted: str
    confidence: float
    true_probability: float


@dataclass(frozen=True)
class ReportInputs:
    """The data of the page, except ``metrics.jsonl``. Sections without data are left out of the page."""

    title: str
    evaluations: Mapping[str, Evaluation]  # by split, most independent one first
    summary: str = ""  # one or two sentences under the title
    folds: CrossValidation | None = None
    note: str = ""  # shown below the figures: which images and weights they belong to
    warnings: Sequence[str] = ()
    diagnosis: Diagnosis | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)  # as requested, nested
    sources: Mapping[str, str] = field(default_factory=dict)  # field path -> where its value came from
    resolved: Mapping[str, Any] = field(default_factory=dict)  # the value of every ``auto``, nested
    phases: Sequence[Mapping[str, Any]] = ()  # name, n_epochs, and for the table n_steps, trainable, head_lr
    stage_names: Mapping[str, str] = field(default_factory=dict)  # stage0 -> stem
    images: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # split -> class -> count
    cost: Mapping[str, float] = field(default_factory=dict)  # names end in their unit
    frozen: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)  # source, identifier, sha256, license
    versions: Mapping[str, str] = field(default_factory=dict)
    temperature: Temperature | None = None
    thresholds: Sequence[float] | None = None  # least probability of each label to be given; None: not chosen by label
    after: Evaluation | None = None  # the first evaluation with temperature scaling, cross-fitted
    curve: AccuracyCoverage | None = None  # of the first evaluation's images
    calibration: Calibration | None = None
    l2_path: Sequence[Mapping[str, float]] = ()  # l2, val_nll, val_score
    l2: float | None = None  # the chosen one
    mistakes: Sequence[ShownMistake] = ()
    mistakes_of: str = ""  # their split


def write_report(run: RunDir, inputs: ReportInputs, drawn: Mapping[str, str]) -> None:
    """Write ``report.html``, and each of its figures as a file in ``figures/``, for MLflow and for slides.

    Args:
        drawn: figures from `finetune.report.run_figures.draw_figures`.
    """
    for name, svg in drawn.items():
        _save_on_white(svg, run.figures / f"{name}.svg")
    page = render_report(inputs, drawn)
    write_atomic(run.report, lambda stream: stream.write(encodable(page).encode()))


def render_report(inputs: ReportInputs, drawn: Mapping[str, str]) -> str:
    """Return the page as one HTML document, with the figures from `draw_figures`."""
    split, evaluation = next(iter(inputs.evaluations.items()))
    shown = {
        name: {
            "uri": data_uri(svg.encode(), "image/svg+xml"),
            "caption": _caption(name, evaluation),
            "wide": name == "confusion" and len(evaluation.classes) > _FITTING_CLASSES,
        }
        for name, svg in drawn.items()
    }
    return render(
        "run.html",
        inputs=inputs,
        split=split,
        figures=shown,
        cards=_cards(split, evaluation),
        splits=_splits(inputs.evaluations),
        classes_first=bool(evaluation.why_leading),
        temperature=_temperature(inputs.temperature, "held-out" if inputs.folds else "val"),
        reliance=checked_sentences(inputs.calibration) if inputs.calibration else [],
        scaled=_scaled(evaluation, inputs.after),
        folds=None if inputs.folds is None else _folds(inputs.folds),
        trained=[shown[name] for name in _TRAINING_FIGURES if name in shown],
        classes=_classes(evaluation, inputs.thresholds),
        confused=_confused(evaluation),
        probability_note=task_named(evaluation.task).probability_note,
        mistakes=[_mistake(mistake) for mistake in inputs.mistakes],
        phases=[_phase(phase, inputs.stage_names) for phase in inputs.phases if "n_steps" in phase],
        resolved=_facts(inputs.resolved),
        asked=[[path, value_text(value), inputs.sources.get(path, "")] for path, value in flat(inputs.spec)],
        images=_images(inputs.images),
        cost=[[cost_label(name), cost_text(name, value)] for name, value in inputs.cost.items()],
        frozen=_facts(inputs.frozen),
        unchanged=_unchanged(inputs.frozen),
        parity=_facts(inputs.parity),
        weights=_facts(inputs.weights),
        versions=_facts(inputs.versions),
    )


def _save_on_white(svg: str, path: Path) -> None:
    on_white = svg.replace("<svg ", '<svg style="background: white" ', 1)
    write_atomic(path, lambda stream: stream.write(encodable(on_white).encode()))


def _caption(name: str, evaluation: Evaluation) -> str:
    if name != "per_class":
        return _CAPTIONS[name]
    n_present = len(evaluation.classes) - len(evaluation.absent)
    which = f"the {SHOWN_CLASSES} worst of {n_present} classes" if n_present > SHOWN_CLASSES else "worst class first"
    ranked = any(row.average_precision is not None for row in evaluation.per_class)
    others = ", precision and average precision" if ranked else " and precision"
    return f"Recall (share of a class's images that were found){others}, {which}; number of images in brackets."


def _cards(split: str, evaluation: Evaluation) -> list[dict[str, str]]:
    task = task_named(evaluation.task)
    headline = evaluation.leading
    why = f"; {evaluation.why_leading}" if evaluation.why_leading else ""
    low, high = (headline.text(bound) for bound in evaluation.intervals[headline.key])
    of_classes = f"mean over {len(evaluation.classes) - len(evaluation.absent)} classes"
    first = {
        "title": f"{_SPLIT_TITLES.get(split, split)}: {headline.label}",
        "value": headline.text(evaluation.values[headline.key]),
        "note": f"95 % interval {low} – {high}, {evaluation.n:,} images{why}",
    }
    shown = {task.headline.key, *_CARD_METRICS}
    others = [metric for metric in task.metrics if metric is not headline and metric.key in shown]
    return [
        first,
        *(
            {
                "title": metric.label,
                "value": metric.text(evaluation.values[metric.key]),
                "note": of_classes if metric.over_classes else "",
            }
            for metric in others
        ),
    ]


def _splits(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return the table of all splits, with notes on classes without images."""
    shown = next(iter(evaluations.values())).shown
    rows = []
    for split, found in evaluations.items():
        figures_of = (_figure(found, metric) for metric in shown)
        rows.append([_SPLIT_TITLES.get(split, split), f"{found.n:,}", *figures_of])
    notes = [
        f"{split} has no image of {natural_list(found.absent, _NAMED_ABSENT)}; the means over classes leave them out."
        for split, found in evaluations.items()
        if found.absent
    ]
    notes += [_cardinality(split, found) for split, found in evaluations.items() if "labels_per_image" in found.facts]
    return {
        "head": ["split", "images", *(metric.label for metric in shown)],
        "rows": rows,
        "notes": ["In brackets: the 95 % interval.", *notes],
    }


def _figure(found: Evaluation, metric: Metric[Any]) -> str:
    value = metric.text(found.values[metric.key])
    if metric.key not in found.intervals:
        return value
    low, high = (metric.text(bound) for bound in found.intervals[metric.key])
    return f"{value} ({low} – {high})"


def _cardinality(split: str, found: Evaluation) -> str:
    true, given = found.facts["labels_per_image"], found.facts["labels_given_per_image"]
    return f"{split}: images have {true:.2f} labels on average (the label cardinality), and were given {given:.2f}."


def _folds(found: CrossValidation) -> dict[str, Any]:
    pooled = found.pooled
    task = task_named(pooled.task)
    headline = pooled.leading
    expected = found.spreads[headline.key]
    low, high = (headline.text(bound) for bound in pooled.intervals[headline.key])
    said = (
        f"Expect {headline.label} {headline.text(expected.mean)}, 95 % interval {headline.text(expected.interval[0])} – "
        f"{headline.text(expected.interval[1])} (Student's t over the folds, widened as they share training images; Nadeau & "
        "Bengio 2003), which estimates the mean over repeated training. Pooled, with each image predicted by a model that had "
        f"not seen it, it is {headline.text(pooled.values[headline.key])} on {pooled.n:,} images, 95 % interval {low} – "
        f"{high}, which estimates these models on more such images."
    )
    if found.has_copies:
        said += (
            " Near duplicates of a fold's training images are left out of the folds' figures; the pooled ones here count them, "
            "and those of cv_unseen do not."
        )
    first = [headline, task.headline, *(metric for metric in task.metrics if metric.key in _FOLD_METRICS)]
    shown = list({metric.key: metric for metric in first}.values())
    names = [metric.key for metric in shown]
    rows = [
        [
            f"fold {fold.fold}",
            f"{fold.n_train:,}",
            f"{fold.n_held_out:,}",
            *(f"{fold.held_out(name):.4f}" for name in names),
            cost_text("fold_seconds", fold.seconds),
        ]
        for fold in found.folds
    ]
    spreads, of_pooled = found.spreads, pooled.metrics("cv")
    over = {
        "mean": [f"{spreads[name].mean:.4f}" for name in names],
        "standard deviation": [f"{spreads[name].standard_deviation:.4f}" for name in names],
        "95 % interval": [f"{spreads[name].interval[0]:.3f} – {spreads[name].interval[1]:.3f}" for name in names],
    }
    rows += [[title, "", "", *values, ""] for title, values in over.items()]
    rows.append(["pooled", "", f"{pooled.n:,}", *(f"{of_pooled[f'cv/{name}']:.4f}" for name in names), ""])
    return {
        "said": said,
        "head": ["", "trained on", "held out", *(metric.label for metric in shown), "took"],
        "rows": rows,
        "kept": [[str(fold.fold), fold.summary] for fold in found.folds],
    }


def _temperature(fitted: Temperature | None, which: str) -> str:
    if fitted is None:
        return ""
    if fitted.at_limit:
        why = f"the best one lies outside 0.01 … 100, as when every {which} image is predicted correctly"
        return f"No temperature was fitted: {why}."
    return (
        f"Temperature {fitted.temperature:.3f}, fitted on the {fitted.n} {which} images: NLL {fitted.nll_before:.3f} → "
        f"{fitted.nll_after:.3f}, ECE {fitted.ece_before:.3f} → {fitted.ece_after:.3f} on those same images (so optimistic)."
    )


def _scaled(before: Evaluation, after: Evaluation | None) -> dict[str, Any]:
    """Return the table of the metrics that temperature scaling changes, before and after."""
    if after is None:
        return {"head": [], "rows": []}
    changed = [metric for metric in task_named(before.task).metrics if before.values[metric.key] != after.values[metric.key]]
    rows = [[metric.label, metric.text(before.values[metric.key]), metric.text(after.values[metric.key])] for metric in changed]
    return {"head": [f"on {before.n:,} images", "before", "after temperature"], "rows": rows}


def _classes(evaluation: Evaluation, thresholds: Sequence[float] | None) -> dict[str, Any]:
    """Return the table of all classes with intervals; for a multi-label task also thresholds and average precision."""
    head = ["class", "images", "predicted", "correct", "precision", "recall", "F1"]
    rows = []
    for row in evaluation.per_class:
        ratios = [_with_interval(getattr(row, name), row.intervals.get(name)) for name in ("precision", "recall")]
        rows.append([row.name, str(row.n), str(row.n_predicted), str(row.n_correct), *ratios, _share(row.f1)])
    if any(row.average_precision is not None for row in evaluation.per_class):
        head.append("average precision")
        for cells, row in zip(rows, evaluation.per_class, strict=True):
            cells.append(_with_interval(row.average_precision, row.intervals.get("average_precision")))
    if thresholds is not None:
        head.append("given from")
        for cells, threshold in zip(rows, thresholds, strict=True):
            cells.append(f"{threshold:.3f}")
    return {"head": head, "rows": rows}


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    return _share(value) if value is None or interval is None else f"{value:.3f} ({interval[0]:.3f} – {interval[1]:.3f})"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _confused(evaluation: Evaluation) -> list[list[str]]:
    counts = {row.name: row.n for row in evaluation.per_class}
    return [
        [true, given, str(count), f"{count / counts[true]:.1%}"] for true, given, count in evaluation.confused_pairs(_MAX_PAIRS)
    ]


def _mistake(mistake: ShownMistake) -> dict[str, Any]:
    return {**vars(mistake), "thumbnail": data_uri(thumbnail(mistake.image), "image/jpeg")}


def _phase(phase: Mapping[str, Any], stage_names: Mapping[str, str]) -> list[str]:
    trains = ", ".join(stage_names.get(f"stage{index}", f"stage{index}") for index in phase["trainable"])
    if not phase["n_steps"]:
        return [str(phase["name"]), trains or "–", "solved", "–", "–"]
    return [str(phase["name"]), trains or "–", str(phase["n_epochs"]), f"{phase['n_steps']:,}", f"{phase['head_lr']:.3g}"]


def _facts(values: Mapping[str, Any]) -> list[list[str]]:
    return [[path, value_text(value)] for path, value in flat(values)]


def _unchanged(frozen: Mapping[str, Any]) -> str:
    """Return whether the digest of all frozen weights is ``same`` or ``changed``; empty if it was not recorded."""
    before, after = frozen.get("digest_before"), frozen.get("digest_after")
    return "" if not before or not after else "same" if before == after else "changed"


def _images(images: Mapping[str, Mapping[str, int]]) -> dict[str, Any] | None:
    if not images:
        return None
    classes = sorted({name for counts in images.values() for name in counts})
    rows = [[name, *(str(counts.get(name, 0)) for counts in images.values())] for name in classes]
    totals = ["all", *(str(sum(counts.values())) for counts in images.values())]
    return {"head": ["class", *images], "rows": [*rows, totals]}
