"""Write the model card of a bundle: the facts in its manifest, as Markdown for users and model hubs. Torch-free.

Facts that the manifest does not contain are left out or called unknown.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.bundle.calibration import DEFAULT_PRECISION, Calibration
from finetune.bundle.manifest import Manifest
from finetune.messages import encodable, natural_list, plural
from finetune.tasks import task_named
from finetune.tasks.leading import WHY_OVER_CLASSES, leading_first, recorded_leading

SHOWN_CLASSES = 100
IMAGES_LICENCE = "The licence of the training images is not recorded."
SPLITS = {
    "cv": "cross-validation: each image was answered by a model that had not seen it",
    "test": "test: images that had no part in training",
    "val": "val: images on which the weights were chosen, so these figures are somewhat too high",
}


def model_card(manifest: Manifest, library: str = "onnx", use: str | None = None) -> str:
    """Return the card of a bundle, with the YAML front matter that model hubs read.

    Args:
        library: name of the library that loads the model, for the front matter.
        use: Markdown that says how to load the model; by default, how to use the bundle with finetune.
    """
    parts = [
        _head(manifest, library),
        f"# {_text(manifest.reference)}\n\n{_what(manifest)}",
        _section("Classes", _classes(manifest.classes)),
        _section("How good it is", _figures(manifest)),
        _section("How far to rely on an answer", _reliance(manifest)),
        _section("How it was made", _table(_made(manifest))),
        _section("Licence", _licence(manifest)),
        _section("Limits", "\n".join(f"- {line}" for line in _limits(manifest))),
        _section("Use", use or _use(manifest)),
    ]
    return encodable("\n\n".join(part for part in parts if part) + "\n")


def _head(manifest: Manifest, library: str) -> str:
    """Return the YAML front matter. Strings are written as JSON, which is valid YAML."""
    licence = _weights(manifest).get("license")
    lines = [
        "---",
        "pipeline_tag: image-classification",
        f"library_name: {library}",
        *([f"license: {json.dumps(str(licence).lower())}"] if licence else []),
        f"base_model: {json.dumps(str(manifest.backbone['name']))}",
        "tags: [image-classification, transfer-learning, finetune]",
        "---",
    ]
    return "\n".join(lines)


def _what(manifest: Manifest) -> str:
    height, width = manifest.preprocess.input_size_px
    made = datetime.datetime.fromtimestamp(manifest.created_at, datetime.UTC).strftime("%Y-%m-%d")
    return (
        f"An image classifier for {plural(len(manifest.classes), 'class')} ({manifest.task}), made on {made}: the backbone "
        f"{_text(manifest.backbone['name'])} with a linear head, trained by the method "
        f"{_text(manifest.method.get('type', 'unknown'))}. It takes images of any size, which become {height} × {width} pixels."
    )


def _classes(classes: Sequence[str]) -> str:
    shown = ", ".join(_text(name) for name in classes[:SHOWN_CLASSES])
    rest = len(classes) - SHOWN_CLASSES
    return f"{shown} … and {rest:,} more" if rest > 0 else shown


def _figures(manifest: Manifest) -> str:
    """Return the section with a table of metrics by split."""
    task, metrics = task_named(manifest.task), manifest.metrics
    splits = [split for split in SPLITS if f"{split}/{task.headline.key}" in metrics]
    if not splits:
        return "The bundle records no figures."
    rows = [["", *splits]]
    rows.append(["images", *(f"{metrics[f'{split}/n']:,.0f}" if f"{split}/n" in metrics else "–" for split in splits)])
    leading = recorded_leading(task, metrics, splits[0])
    for metric in leading_first(task, leading):
        if len(manifest.classes) >= metric.least_classes:
            rows.append([metric.label, *(_figure(metrics, split, metric) for split in splits)])
    why = "" if leading is task.headline else f"; {WHY_OVER_CLASSES}"
    details = "\n".join(f"- {SPLITS[split]}" for split in splits)
    notes = "".join(f"\n- {_text(note)}" for note in manifest.method.get("notes", ()))
    return f"{_table(rows)}\n\nIn brackets: the 95 % interval{why}.\n\n{details}{notes}"


def _figure(metrics: Mapping[str, float], split: str, metric: Any) -> str:
    key = f"{split}/{metric.key}"
    if key not in metrics:
        return "–"
    bounds = [metrics.get(f"{key}_{end}") for end in ("low", "high")]
    interval = "" if None in bounds else f" ({metric.text(bounds[0])} – {metric.text(bounds[1])})"
    return f"{metric.text(metrics[key])}{interval}"


def _reliance(manifest: Manifest) -> str:
    """Return the section about thresholds, or about calibration and abstention."""
    calibration, thresholds = Calibration.of(manifest.calibration), manifest.thresholds
    if thresholds is not None:
        shown = zip(manifest.classes[:SHOWN_CLASSES], thresholds, strict=False)
        limits = ", ".join(f"{_text(name)} {threshold:.2f}" for name, threshold in shown)
        return (
            "An image may have several labels, or none. Each is given where its probability reaches its threshold, which is the "
            f"one with the highest F1 that held-out images let expect, or 0.5 where these are too few: {limits}."
        )
    if calibration is None:
        return "The bundle has no calibration on held-out images, so it can neither give prediction sets nor abstain."
    lines = []
    if temperature := manifest.calibration.get("temperature"):
        lines.append(f"Probabilities are scaled by a temperature of {temperature:.3f}, fitted on held-out images.")
    lines.append(f"Prediction sets and abstention are calibrated on {calibration.n:,} held-out images ({calibration.split}).")
    lines += checked_sentences(calibration)
    chosen = manifest.abstain.get("precision")
    lines.append(
        f"It abstains by default, at a precision of {chosen:.0%}." if chosen else "It abstains only on request (--abstain)."
    )
    return "\n".join(f"- {line}" for line in lines)


def checked_sentences(calibration: Calibration) -> list[str]:
    """Return sentences about the calibrated precision and coverage, and about those that were measured on the test images."""
    sentences = []
    level = f"{DEFAULT_PRECISION:.2f}"
    if level in calibration.precision:
        answered = calibration.precision[level].answered
        sentences.append(
            f"With a precision of {DEFAULT_PRECISION:.0%}, it answers {answered:.0%} of the held-out images and abstains from "
            "the others; the precision of its answers is at least that with a confidence of 90 %."
        )
    elif best := max(calibration.precision, default=None):
        sentences.append(f"The highest precision that its held-out images allow is {float(best):.0%}.")
    else:
        sentences.append("Its held-out images are too few for a precision of 50 % or more, so it cannot abstain by confidence.")
    if not calibration.novelty:
        sentences.append("It has no score for images that are unlike the known ones.")
    checked = calibration.checked
    where = f"On {checked.get('n', 0):,} {checked.get('split')} images"
    if found := checked.get("coverage"):
        sentences.append(
            f"{where}, sets of {found['asked']:.0%} coverage held the right label for {_interval(found)} of the images, with "
            f"{found['mean_size']:.2f} labels on average."
        )
    if found := checked.get("precision"):
        right = f", and {_interval(found)} of these answers were right" if "value" in found else ""
        sentences.append(f"{where}, asked for {found['asked']:.0%} precision, it answered {found['answered']:.1%}{right}.")
    if found := checked.get("unlike"):
        sentences.append(f"{where}, {_interval(found)} counted as unlike the known images ({found['asked']:.0%} are meant to).")
    return sentences


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['value']:.1%} ({found['low']:.1%} – {found['high']:.1%})"


def _made(manifest: Manifest) -> list[list[str]]:
    """Return the rows of the table that says how the model was made."""
    weights, preprocess = _weights(manifest), manifest.preprocess
    size = manifest.backbone.get("n_parameters")
    frozen = manifest.frozen.get("stages")
    before, after = manifest.frozen.get("digest_before"), manifest.frozen.get("digest_after")
    rows = [
        ["what", "recorded"],
        ["backbone", f"{_text(manifest.backbone['name'])}{f', {size:,} parameters' if isinstance(size, int) else ''}"],
        ["pretrained weights", _text(weights.get("identifier") or "unknown")],
        *([["started from", _started_from(weights)]] if weights.get("origin") else []),
        ["sha256 of the weights", f"`{weights['sha256']}`" if weights.get("sha256") else "unknown"],
        ["method", _method(manifest.method)],
        ["preprocessing", f"{preprocess.resize}, {preprocess.interpolation}"],
        ["request", f"`{manifest.spec_digest[:12]}`" if manifest.spec_digest else "unknown"],
        ["libraries", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()) or "unknown"],
    ]
    if frozen:
        proof = " (their digest before and after training is the same)" if before and before == after else ""
        rows.insert(
            rows.index(["method", _method(manifest.method)]) + 1,
            ["frozen stages", f"{natural_list([_text(stage) for stage in frozen])}{proof}"],
        )
    return rows


def _first(weights: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the pretrained weights of the first model in the chain of models that these weights come from."""
    while origin := weights.get("origin"):
        weights = origin.get("weights") or {}
    return weights


def _started_from(weights: Mapping[str, Any]) -> str:
    """Return a phrase with the models that this one was trained on from, the last one first, and the first one's weights."""
    names, first = [], _first(weights)
    while origin := weights.get("origin"):
        names.append(_text(origin["model"]))
        weights = origin.get("weights") or {}
    return f"{', which started from '.join(names)}; pretrained weights: {_text(first.get('identifier') or 'unknown')}"


def _method(method: Mapping[str, Any]) -> str:
    settings = {key: value for key, value in method.items() if key not in ("type", "notes") and value is not None}
    details = "; ".join(f"{key}: {value}" for key, value in settings.items())
    return _text(f"{method.get('type', 'unknown')}{f' ({details})' if details else ''}")


def _licence(manifest: Manifest) -> str:
    weights = _weights(manifest)
    if _first(weights).get("source") == "none":
        return (
            "The backbone was not pretrained: no licence of weights applies. The licence of the training images is not recorded."
        )
    licence = weights.get("license")
    licence_text = (
        f"come under {_text(licence)}" if licence else "come under a licence that is not recorded: ask their author before use"
    )
    return f"The pretrained weights {licence_text}. {IMAGES_LICENCE}"


def _limits(manifest: Manifest) -> list[str]:
    """Return sentences about the limits of the model."""
    split = next((split for split in SPLITS if f"{split}/n" in manifest.metrics), None)
    lines = []
    if manifest.label_thresholds is None:
        always = "It answers with one of its classes for every image, also for one that shows none of them"
        lines.append(f"{always}{', unless it abstains' if Calibration.of(manifest.calibration) else ''}.")
    if split is not None:
        n = manifest.metrics[f"{split}/n"]
        lines.append(f"Its figures hold for images like the {n:,.0f} that it was evaluated on; measure it again on any others.")
    if split == "val":
        lines.append("No image was kept apart from all choices, so how good it is on new images was not measured.")
    if reason := manifest.cam.get("reason"):
        lines.append(f"It has no class activation map: {_text(reason)}.")
    if manifest.model.get("quantization", {}).get("kept"):
        lines.append("It is quantised to int8; calibration was done on the answers of the float model.")
    return lines


def _use(manifest: Manifest) -> str:
    calibration = Calibration.of(manifest.calibration)
    asked = "" if calibration is None else f" --coverage 0.9{_abstaining(calibration)}"
    model = f"--model {manifest.reference}"
    return f"```sh\nfinetune predict some.jpg {model}{asked}\nfinetune serve {model}\n```"


def _abstaining(calibration: Calibration) -> str:
    """Return the options for abstention with the default precision, or with the highest one that the model can have."""
    if f"{DEFAULT_PRECISION:.2f}" in calibration.precision:
        return " --abstain"
    best = max(calibration.precision, default=None)
    return "" if best is None else f" --abstain --precision {best}"


def _weights(manifest: Manifest) -> Mapping[str, Any]:
    return manifest.backbone.get("weights") or {}


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)


def _text(value: object) -> str:
    """Return a value as text in one line, escaped for Markdown."""
    line = " ".join(str(value).split())
    escaped = "".join(f"\\{character}" if character in "\\`*[]<>#|~" else character for character in line)
    return re.sub(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", r"\\_", escaped)  # within a word, an underscore is no markup
