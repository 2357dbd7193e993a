"""report.html: what a run did and how far to trust it, as one file that loads nothing from anywhere.

Takes plain values and the run folder's journal; knows nothing of torch, specs or bundles. Pictures are embedded, there is no
script, and a content security policy in the page itself forbids the browser to fetch anything. Every text that came from the user
(class names, file names, metadata) is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from finetune.evaluation import figures
from finetune.evaluation.metrics import Evaluation, Temperature
from finetune.rundir import RunDir, read_lines, write_atomic

_THUMBNAIL_PX = 176
_MAX_PAIRS = 12
_NAMED_ABSENT = 10
_FITTING_CLASSES = 50  # a confusion matrix of more is shown in its full size, to be scrolled

_CAPTIONS = {
    "l2_path": "The head is solved, not stepped: its L2 strength is the one with the lowest held-out loss.",
    "learning_curves": "Accuracy and loss by epoch. The ring marks the best val accuracy.",
    "stage_signals": "Per stage, running medians: gradient norm before clipping, and step norm over weight norm.",
    "learning_rate": "Learning rate by step.",
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
    warnings: Sequence[str] = ()
    spec: Mapping[str, Any] = field(default_factory=dict)  # as resolved, nested
    sources: Mapping[str, str] = field(default_factory=dict)  # field path -> where its value came from
    phases: Sequence[Mapping[str, Any]] = ()  # name, n_epochs
    stage_names: Mapping[str, str] = field(default_factory=dict)  # stage0 -> stem
    images: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # split -> class -> count
    cost: Mapping[str, float] = field(default_factory=dict)  # names end in their unit
    frozen: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)  # source, identifier, sha256, license
    versions: Mapping[str, str] = field(default_factory=dict)
    temperature: Temperature | None = None
    l2_path: Sequence[Mapping[str, float]] = ()  # l2, val_nll, val_top1
    l2: float | None = None  # the chosen one
    mistakes: Sequence[ShownMistake] = ()


def write_report(run: RunDir, inputs: ReportInputs) -> None:
    """Write ``report.html``, and each of its figures as a PNG into ``figures/``."""
    drawn = draw_figures(read_lines(run.metrics), inputs)
    for name, figure in drawn.items():
        figures.save_png(figure, run.figures / f"{name}.png")
    page = render_report(inputs, drawn)
    write_atomic(run.report, lambda stream: stream.write(page.encode()))


def draw_figures(records: Sequence[figures.Record], inputs: ReportInputs) -> dict[str, Figure]:
    """The figures that this run has data for, by name, those that judge it drawn from its first evaluation."""
    judged = next(iter(inputs.evaluations.values()))
    candidates = {
        "learning_curves": figures.learning_curves(records, inputs.phases),
        "learning_rate": figures.learning_rate(records),
        "stage_signals": figures.stage_signals(records, inputs.stage_names),
        "l2_path": figures.l2_path(inputs.l2_path, inputs.l2) if inputs.l2 is not None else None,
        "confusion": figures.confusion_matrix(judged),
        "per_class": figures.per_class_bars(judged),
        "reliability": figures.reliability_diagram(judged),
    }
    return {name: figure for name, figure in candidates.items() if figure is not None}


def render_report(inputs: ReportInputs, drawn: Mapping[str, Figure]) -> str:
    """The page."""
    split, judged = next(iter(inputs.evaluations.items()))
    embedded = {name: figures.to_svg(figure) for name, figure in drawn.items()}
    sections = [
        _section("Result", _cards(split, judged), _splits_table(inputs.evaluations), _temperature(inputs.temperature)),
        _section(
            "Training",
            *(
                _figure(embedded, name, _CAPTIONS[name])
                for name in ("l2_path", "learning_curves", "stage_signals", "learning_rate")
            ),
        ),
        _section(
            f"Classes ({split})",
            _figure(embedded, "per_class", _bars_caption(judged)),
            _details("All classes as a table", _class_table(judged)),
        ),
        _section(
            f"Confusion ({split})",
            _figure(embedded, "confusion", _CAPTIONS["confusion"], wide=len(judged.classes) > _FITTING_CLASSES),
            _pairs_table(judged),
        ),
        _section(f"Calibration ({split})", _figure(embedded, "reliability", _CAPTIONS["reliability"])),
        _section(f"Most confident mistakes ({split})", _gallery(inputs.mistakes)),
        _section("What was run", _spec_table(inputs.spec, inputs.sources), _images_table(inputs.images)),
        _section("Cost", _facts(inputs.cost)),
        _section("Proof that frozen stayed frozen", _facts(inputs.frozen)),
        _section("Parity of the exported model", _facts(inputs.parity)),
        _section("Pretrained weights and their licence", _facts(inputs.weights)),
        _section("Versions", _facts(inputs.versions)),
    ]
    warnings = "".join(f'<p class="warning">{escape(text)}</p>' for text in inputs.warnings)
    summary = f"<p>{escape(inputs.summary)}</p>" if inputs.summary else ""
    return _PAGE.format(title=escape(inputs.title), style=_STYLE, summary=summary, warnings=warnings, sections="".join(sections))


# -- parts of the page


def _section(title: str, *parts: str) -> str:
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _figure(embedded: Mapping[str, str], name: str, caption: str, *, wide: bool = False) -> str:
    """The SVG as an image of its own, so that the ids inside it cannot meet those of another one. A wide one scrolls."""
    if name not in embedded:
        return ""
    data = base64.b64encode(embedded[name].encode()).decode()
    return (
        f'<figure class="drawn{" wide" if wide else ""}"><img src="data:image/svg+xml;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _cards(split: str, judged: Evaluation) -> str:
    low, high = judged.top1_interval
    cards = [
        (f"{split} top-1", f"{judged.top1:.1%}", f"95 % interval {low:.1%} – {high:.1%}, {judged.n} images"),
        ("macro F1", f"{judged.macro_f1:.3f}", f"mean over {sum(1 for row in judged.per_class if row.n)} classes"),
        ("mean per-class accuracy", f"{judged.mean_per_class_accuracy:.1%}", "each class counts the same"),
        ("ECE", f"{judged.ece:.3f}", f"{len(judged.bins)} equal bins"),
    ]
    body = "".join(f"<div><h3>{escape(h)}</h3><strong>{escape(v)}</strong><p>{escape(n)}</p></div>" for h, v, n in cards)
    return f'<div class="cards">{body}</div>'


def _splits_table(evaluations: Mapping[str, Evaluation]) -> str:
    head = ["split", "images", "top-1", "95 % interval", "top-5", "macro F1", "per-class accuracy", "NLL", "ECE", "Brier"]
    rows = [[split, *_split_row(evaluation)] for split, evaluation in evaluations.items()]
    notes = [_absent_note(split, evaluation) for split, evaluation in evaluations.items() if evaluation.absent]
    return _table(head, rows) + "".join(notes)


def _absent_note(split: str, evaluation: Evaluation) -> str:
    named, rest = evaluation.absent[:_NAMED_ABSENT], len(evaluation.absent) - _NAMED_ABSENT
    names = ", ".join(named) + (f" and {rest} more" if rest > 0 else "")
    return f"<p>{escape(split)} has no image of {escape(names)}; the means over classes leave them out.</p>"


def _split_row(e: Evaluation) -> list[str]:
    interval = f"{e.top1_interval[0]:.1%} – {e.top1_interval[1]:.1%}"
    shares = [f"{e.macro_f1:.3f}", f"{e.mean_per_class_accuracy:.1%}", f"{e.nll:.3f}", f"{e.ece:.3f}", f"{e.brier:.3f}"]
    top_k = f"{e.top5:.1%}" if e.top5_k < len(e.classes) else "–"  # every class is among the first k
    return [str(e.n), f"{e.top1:.1%}", interval, top_k, *shares]


def _temperature(fitted: Temperature | None) -> str:
    if fitted is None:
        return ""
    if fitted.at_limit:
        return (
            "<p>No temperature was fitted: the best one lies outside 0.01 … 100, as when every val image is labelled rightly.</p>"
        )
    return (
        f"<p>Temperature {fitted.temperature:.3f}, fitted on the {fitted.n} val images: NLL {fitted.nll_before:.3f} → "
        f"{fitted.nll_after:.3f}, ECE {fitted.ece_before:.3f} → {fitted.ece_after:.3f} on those same images (so optimistic).</p>"
    )


def _bars_caption(judged: Evaluation) -> str:
    n_present = sum(1 for row in judged.per_class if row.n)
    shown = f"the {figures.MAX_BARS} worst of {n_present} classes" if n_present > figures.MAX_BARS else "worst class first"
    return f"Recall (share of a class's images that were found) and precision, {shown}; number of images in brackets."


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
    return _table(["class", "images", "predicted", "correct", "precision", "recall", "F1"], rows)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _pairs_table(judged: Evaluation) -> str:
    pairs = judged.confused_pairs(_MAX_PAIRS)
    if not pairs:
        return "<p>Not one image was labelled wrongly.</p>"
    counts = {row.name: row.n for row in judged.per_class}
    rows = [[true, given, str(count), f"{count / counts[true]:.1%}"] for true, given, count in pairs]
    return _table(["true", "predicted as", "images", "share of the true class"], rows, text_columns=2)


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


def _spec_table(spec: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    rows = [[path, _value(path, value), sources.get(path, "")] for path, value in _flat(spec)]
    return _table(["field", "value", "where it came from"], rows, text_columns=3) if rows else ""


def _images_table(images: Mapping[str, Mapping[str, int]]) -> str:
    if not images:
        return ""
    classes = sorted({name for counts in images.values() for name in counts})
    rows = [[name, *(str(counts.get(name, 0)) for counts in images.values())] for name in classes]
    totals = ["all", *(str(sum(counts.values())) for counts in images.values())]
    return _details("Images by class and split", _table(["class", *images], [*rows, totals]))


def _facts(facts: Mapping[str, Any]) -> str:
    rows = [[path, _value(path, value)] for path, value in _flat(facts)]
    return _table(["", ""], rows, text_columns=2) if rows else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """Columns after the first `text_columns` hold numbers and stand right-aligned."""

    def cells(texts: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{'' if i < text_columns else ' class=n'}>{escape(text)}</{tag}>" for i, text in enumerate(texts))

    header = f"<thead><tr>{cells(head, 'th')}</tr></thead>" if any(head) else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="table"><table>{header}<tbody>{body}</tbody></table></div>'


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(name: str, value: Any) -> str:
    """A value as a person reads it; the unit is in its name."""
    if value is None or value == {} or value == [] or value == ():
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_value("", item) for item in value)
    if not isinstance(value, int | float):
        return str(value)
    if name.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if name.endswith("_seconds") and value >= 60:
        return f"{int(value) // 60} min {int(value) % 60} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>{summary}{warnings}</header>
<main>{sections}</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark;
  --ink: #24292f; --faint: #59636e; --line: #d8dee4; --ground: #fff; --panel: #f6f8fa; --warn: #9a6700; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe5ea; --faint: #9aa5b1; --line: #333b44; --ground: #12161b; --panel: #1a2027; --warn: #e3b341; }
  .drawn img { filter: invert(0.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
.warning { border-left: 3px solid var(--warn); padding: .3rem .75rem; background: var(--panel); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .75rem; margin-bottom: 1rem; }
.cards div { background: var(--panel); border-radius: .5rem; padding: .75rem 1rem; }
.cards h3 { margin: 0; font-size: .85rem; font-weight: 500; color: var(--faint); }
.cards strong { font-size: 1.7rem; font-variant-numeric: tabular-nums; }
.cards p { margin: 0; font-size: .8rem; color: var(--faint); }
.table { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { font-weight: 600; color: var(--faint); white-space: nowrap; }
.n { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; }
.drawn img { display: block; max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
.wide img { max-width: none; }
figcaption { font-size: .82rem; color: var(--faint); margin-top: .25rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
.gallery figure { margin: 0; }
.gallery img { max-width: 100%; height: auto; border-radius: .35rem; }
.gallery b { color: var(--ink); }
.file { font-size: .75rem; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--faint); }
@media print { details { display: none; } body { max-width: none; } }
"""
