"""report.html: what a run did and how far to trust it, as one file that loads nothing from anywhere.

Takes plain values and the run folder's journal; knows nothing of torch, specs or bundles. Pictures are embedded, there is no
script, and every text that came from the user (class names, file names, metadata) is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.evaluation.evaluate import Evaluation
from finetune.evaluation.folds import CrossValidation
from finetune.messages import encodable
from finetune.metrics.temperature import Temperature
from finetune.report import figures
from finetune.report.markup import cost_text, details, drawing, facts, flat, page, section, table, value_text, warning
from finetune.storage.files import write_atomic
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.tasks import task_named

_THUMBNAIL_PX = 176
_MAX_PAIRS = 12
_NAMED_ABSENT = 10
_FITTING_CLASSES = 50  # a confusion matrix of more is shown in its full size, to be scrolled

_SPLIT_TITLES = {"cv": "cross-validation", "val": "val (which chose the weights)"}
_CARD_METRICS = ("macro_f1", "mean_per_class_accuracy", "ece")
_TRAINING_FIGURES = ("l2_path", "learning_curves", "stage_signals", "learning_rate")
_CAPTIONS = {
    "l2_path": "The head is solved, not stepped: its L2 strength is the one with the lowest held-out loss.",
    "learning_curves": "Accuracy and loss by epoch. The ring marks the best val accuracy.",
    "stage_signals": "Per stage, running medians: gradient norm before clipping, and step norm over weight norm.",
    "learning_rate": "Learning rate by step.",
    "fold_scores": "Each fold on what it held out, the mean over folds with its 95 % interval, and all answers pooled.",
    "confusion": "Rows are true classes, columns what was predicted; shade is the share of the row.",
    "reliability": "Below the dashed line the model is surer than it is right. Small bins are noisy.",
}


@dataclass(frozen=True)
class ShownMistake:
    """A wrongly labelled image for the gallery."""

    image: NDArray[np.uint8]  # (h, w, 3) RGB, as the model saw it
    file: str
    true: str
    predicted: str
    confidence: float
    true_probability: float


@dataclass(frozen=True)
class ReportInputs:
    """Everything on the page that is not in ``metrics.jsonl``. Empty parts are left out of the page."""

    title: str
    evaluations: Mapping[str, Evaluation]  # by split, the one to judge by first
    summary: str = ""  # one or two sentences under the title
    folds: CrossValidation | None = None
    note: str = ""  # on what the figures are of, below them
    warnings: Sequence[str] = ()
    spec: Mapping[str, Any] = field(default_factory=dict)  # as asked, nested
    sources: Mapping[str, str] = field(default_factory=dict)  # field path -> where its value came from
    resolved: Mapping[str, Any] = field(default_factory=dict)  # what every auto became, nested
    phases: Sequence[Mapping[str, Any]] = ()  # name, n_epochs, and for the table n_steps, trainable, head_lr
    stage_names: Mapping[str, str] = field(default_factory=dict)  # stage0 -> stem
    images: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # split -> class -> count
    cost: Mapping[str, float] = field(default_factory=dict)  # names end in their unit
    frozen: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)  # source, identifier, sha256, license
    versions: Mapping[str, str] = field(default_factory=dict)
    temperature: Temperature | None = None
    l2_path: Sequence[Mapping[str, float]] = ()  # l2, val_nll, val_score
    l2: float | None = None  # the chosen one
    mistakes: Sequence[ShownMistake] = ()
    mistakes_of: str = ""  # the split that they are of


def write_report(run: RunDir, inputs: ReportInputs) -> None:
    """Write ``report.html``, and each of its figures into ``figures/`` too, for MLflow and for slides."""
    drawn = draw_figures(read_lines(run.metrics), inputs)
    for name, svg in drawn.items():
        figures.save_svg(svg, run.figures / f"{name}.svg")
    page = render_report(inputs, drawn)
    write_atomic(run.report, lambda stream: stream.write(encodable(page).encode()))


def draw_figures(records: Sequence[figures.Record], inputs: ReportInputs) -> dict[str, str]:
    """The figures that this run has data for, by name and as SVG, those that judge it drawn from its first evaluation."""
    judged = next(iter(inputs.evaluations.values()))
    candidates = {
        "learning_curves": figures.learning_curves(records, inputs.phases),
        "learning_rate": figures.learning_rate(records),
        "stage_signals": figures.stage_signals(records, inputs.stage_names),
        "l2_path": figures.l2_path(inputs.l2_path, inputs.l2) if inputs.l2 is not None else None,
        "fold_scores": figures.fold_scores(inputs.folds) if inputs.folds else None,
        "confusion": figures.confusion_matrix(judged),
        "per_class": figures.per_class_bars(judged),
        "reliability": figures.reliability_diagram(judged),
    }
    return {name: figures.to_svg(figure) for name, figure in candidates.items() if figure is not None}


def render_report(inputs: ReportInputs, drawn: Mapping[str, str]) -> str:
    """The page, with what `draw_figures` gave."""
    split, judged = next(iter(inputs.evaluations.items()))
    shown = {name: drawing(svg, _caption(name, judged), wide=_is_wide(name, judged)) for name, svg in drawn.items()}
    sections = [
        section(
            "Result",
            _cards(split, judged),
            _splits_table(inputs.evaluations),
            _note(inputs.note),
            _temperature(inputs.temperature, "held-out" if inputs.folds else "val"),
        ),
        section("Cross-validation", *_folds(inputs.folds, shown.get("fold_scores", ""))),
        section("Training", *(shown.get(name, "") for name in _TRAINING_FIGURES)),
        section(f"Classes ({split})", shown.get("per_class", ""), details("All classes as a table", _class_table(judged))),
        section(f"Confusion ({split})", shown.get("confusion", ""), _pairs_table(judged)),
        section(f"Calibration ({split})", shown.get("reliability", "")),
        section(f"Most confident mistakes ({inputs.mistakes_of})", _gallery(inputs.mistakes)),
        section(
            "What was run",
            _phases_table(inputs.phases, inputs.stage_names),
            facts(inputs.resolved),
            details("What was asked, and where each choice came from", _spec_table(inputs.spec, inputs.sources)),
            details("Images by class and split", _images_table(inputs.images)),
        ),
        section("Cost", facts(inputs.cost, cost_text)),
        section("Proof that frozen stayed frozen", _unchanged(inputs.frozen), facts(inputs.frozen)),
        section("Parity of the exported model", facts(inputs.parity)),
        section("Pretrained weights and their licence", facts(inputs.weights)),
        section("Versions", facts(inputs.versions)),
    ]
    opening = f"<p>{escape(inputs.summary)}</p>" if inputs.summary else ""
    return page(inputs.title, opening + "".join(map(warning, inputs.warnings)), "".join(sections))


def _caption(name: str, judged: Evaluation) -> str:
    if name != "per_class":
        return _CAPTIONS[name]
    n_present = len(judged.classes) - len(judged.absent)
    which = f"the {figures.MAX_BARS} worst of {n_present} classes" if n_present > figures.MAX_BARS else "worst class first"
    return f"Recall (share of a class's images that were found) and precision, {which}; number of images in brackets."


def _is_wide(name: str, judged: Evaluation) -> bool:
    return name == "confusion" and len(judged.classes) > _FITTING_CLASSES


def _cards(split: str, judged: Evaluation) -> str:
    task = task_named(judged.task)
    low, high = judged.intervals[judged.headline]
    headline = task.headline
    of_classes = f"mean over {len(judged.classes) - len(judged.absent)} classes"
    cards = [
        (
            f"{_SPLIT_TITLES.get(split, split)}: {headline.label}",
            headline.text(judged.values[headline.key]),
            f"95 % interval {headline.text(low)} – {headline.text(high)}, {judged.n:,} images",
        ),
        *(
            (
                metric.label,
                metric.text(judged.values[metric.key]),
                of_classes if metric.over_classes else "",
            )
            for metric in task.metrics
            if metric is not headline and metric.key in _CARD_METRICS
        ),
    ]
    body = "".join(f"<div><h3>{escape(h)}</h3><strong>{escape(v)}</strong><p>{escape(n)}</p></div>" for h, v, n in cards)
    return f'<div class="cards">{body}</div>'


def _splits_table(evaluations: Mapping[str, Evaluation]) -> str:
    head = ["split", "images", "95 % interval", *(metric.label for metric in next(iter(evaluations.values())).shown)]
    rows = [[_SPLIT_TITLES.get(split, split), *_split_row(evaluation)] for split, evaluation in evaluations.items()]
    notes = [_absent_note(split, evaluation) for split, evaluation in evaluations.items() if evaluation.absent]
    return table(head, rows) + "".join(notes)


def _absent_note(split: str, evaluation: Evaluation) -> str:
    named, rest = evaluation.absent[:_NAMED_ABSENT], len(evaluation.absent) - _NAMED_ABSENT
    names = ", ".join(named) + (f" and {rest} more" if rest > 0 else "")
    return f"<p>{escape(split)} has no image of {escape(names)}; the means over classes leave them out.</p>"


def _split_row(e: Evaluation) -> list[str]:
    low, high = (task_named(e.task).headline.text(bound) for bound in e.intervals[e.headline])
    return [f"{e.n:,}", f"{low} – {high}", *(metric.text(e.values[metric.key]) for metric in e.shown)]


def _folds(found: CrossValidation | None, picture: str) -> list[str]:
    if found is None:
        return []
    top1, pooled = found.spreads["top1"], found.pooled
    said = (
        f"Expect a top-1 of {top1.mean:.1%}, 95 % interval {_percents(top1.interval)} (Student's t over the folds, widened as "
        "they share training images; Nadeau & Bengio 2003), which is for what training in this way comes to on average. Pooled, "
        f"{pooled.values['top1']:.1%} of {pooled.n:,} images were labelled rightly by a model that had not seen them, 95 % "
        f"interval {_percents(pooled.intervals['top1'])} (Wilson), which is for these models on more such images."
    )
    kept = table(["fold", "what it kept"], [[str(fold.fold), fold.summary] for fold in found.folds], text_columns=2)
    return [f"<p>{escape(said)}</p>", picture, _folds_table(found), details("What each fold kept", kept)]


def _percents(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.1%} – {interval[1]:.1%}"


def _folds_table(found: CrossValidation) -> str:
    names = ("top1", "macro_f1", "mean_per_class_accuracy", "loss")  # an ECE of few images is biased upwards: only pooled
    rows = [
        [
            f"fold {fold.fold}",
            f"{fold.n_train:,}",
            f"{fold.n_test:,}",
            *(f"{fold.metrics[f'test/{name}']:.4f}" for name in names),
            cost_text("fold_seconds", fold.seconds),
        ]
        for fold in found.folds
    ]
    spreads, pooled = found.spreads, found.pooled.metrics("cv")
    over = {
        "mean": [f"{spreads[name].mean:.4f}" for name in names],
        "standard deviation": [f"{spreads[name].standard_deviation:.4f}" for name in names],
        "95 % interval": [f"{spreads[name].interval[0]:.3f} – {spreads[name].interval[1]:.3f}" for name in names],
    }
    rows += [[title, "", "", *figures_of, ""] for title, figures_of in over.items()]
    rows.append(["pooled", "", f"{found.pooled.n:,}", *(f"{pooled[f'cv/{name}']:.4f}" for name in names), ""])
    head = ["", "trained on", "held out", "top-1", "macro F1", "per-class accuracy", "NLL", "took"]
    return table(head, rows)


def _note(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""


def _temperature(fitted: Temperature | None, which: str) -> str:
    if fitted is None:
        return ""
    if fitted.at_limit:
        why = f"the best one lies outside 0.01 … 100, as when every {which} image is labelled rightly"
        return f"<p>No temperature was fitted: {why}.</p>"
    return (
        f"<p>Temperature {fitted.temperature:.3f}, fitted on the {fitted.n} {which} images: NLL {fitted.nll_before:.3f} → "
        f"{fitted.nll_after:.3f}, ECE {fitted.ece_before:.3f} → {fitted.ece_after:.3f} on those same images (so optimistic).</p>"
    )


def _class_table(judged: Evaluation) -> str:
    rows = [
        [
            row.name,
            str(row.n),
            str(row.n_predicted),
            str(row.n_correct),
            _share(row.precision),
            _share(row.recall),
            _share(row.f1),
        ]
        for row in judged.per_class
    ]
    return table(["class", "images", "predicted", "correct", "precision", "recall", "F1"], rows)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _pairs_table(judged: Evaluation) -> str:
    pairs = judged.confused_pairs(_MAX_PAIRS)
    if not pairs:
        return "<p>Not one image was labelled wrongly.</p>"
    counts = {row.name: row.n for row in judged.per_class}
    rows = [[true, given, str(count), f"{count / counts[true]:.1%}"] for true, given, count in pairs]
    return table(["true", "predicted as", "images", "share of the true class"], rows, text_columns=2)


def _gallery(mistakes: Sequence[ShownMistake]) -> str:
    return f'<div class="gallery">{"".join(map(_mistake, mistakes))}</div>' if mistakes else ""


def _mistake(mistake: ShownMistake) -> str:
    thumbnail = Image.fromarray(mistake.image)
    thumbnail.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    stream = io.BytesIO()
    thumbnail.save(stream, format="JPEG", quality=82)
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{escape(mistake.file)}" '
        f'width="{thumbnail.width}" height="{thumbnail.height}">'
        f"<figcaption>given <b>{escape(mistake.predicted)}</b> {mistake.confidence:.0%}<br>"
        f"true <b>{escape(mistake.true)}</b> {mistake.true_probability:.1%}<br>"
        f'<span class="file">{escape(mistake.file)}</span></figcaption></figure>'
    )


def _phases_table(phases: Sequence[Mapping[str, Any]], stage_names: Mapping[str, str]) -> str:
    rows = [_phase_row(phase, stage_names) for phase in phases if "n_steps" in phase]
    head = ["phase", "trains, besides the head", "epochs", "steps", "peak learning rate"]
    return table(head, rows, text_columns=2) if rows else ""


def _phase_row(phase: Mapping[str, Any], stage_names: Mapping[str, str]) -> list[str]:
    trains = ", ".join(stage_names.get(f"stage{index}", f"stage{index}") for index in phase["trainable"])
    if not phase["n_steps"]:
        return [str(phase["name"]), trains or "–", "solved", "–", "–"]
    return [str(phase["name"]), trains or "–", str(phase["n_epochs"]), f"{phase['n_steps']:,}", f"{phase['head_lr']:.3g}"]


def _spec_table(spec: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    rows = [[path, value_text(value), sources.get(path, "")] for path, value in flat(spec)]
    return table(["field", "asked", "decided by"], rows, text_columns=3) if rows else ""


def _unchanged(frozen: Mapping[str, Any]) -> str:
    before, after = frozen.get("digest_before"), frozen.get("digest_after")
    if not before or not after:
        return ""
    if before != after:
        return warning("Something that should have been frozen changed: the digests differ.")
    return "<p>One sha256 over every frozen weight and running statistic, taken before and after training: they are the same.</p>"


def _images_table(images: Mapping[str, Mapping[str, int]]) -> str:
    if not images:
        return ""
    classes = sorted({name for counts in images.values() for name in counts})
    rows = [[name, *(str(counts.get(name, 0)) for counts in images.values())] for name in classes]
    totals = ["all", *(str(sum(counts.values())) for counts in images.values())]
    return table(["class", *images], [*rows, totals])
