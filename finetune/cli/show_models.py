"""Print registered models in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from finetune.cli.show_evaluation import EVALUATED_ON
from finetune.cli.terminal import table
from finetune.evaluation.evaluate import MOST_INDEPENDENT_FIRST
from finetune.progress_bars import console
from finetune.tasks import task_named
from finetune.tasks.leading import WHY_OVER_CLASSES, leading_first, recorded_leading

if TYPE_CHECKING:
    from finetune.bundle.access import Access
    from finetune.bundle.deployment import Deployment
    from finetune.bundle.manifest import Manifest
    from finetune.bundle.registry import ModelVersion


def show_models(
    versions: Sequence[ModelVersion],
    access: Mapping[str, Access],
    default: ModelVersion | None,
    deployed: Deployment | None,
) -> None:
    """Print for `finetune models list` the versions, aliases and owners, and the default model."""
    if not versions:
        console.print("no model yet: `finetune train FOLDER` trains one; `finetune demo` shows the whole workflow on an example")
        return
    rows = []
    for version in versions:
        aliases = [*version.aliases, *(["default"] if default is not None and default.path == version.path else [])]
        who = access[version.name]
        rows.append(
            [version.name, version.version, ", ".join(aliases), "all" if who.visibility == "shared" else who.owner or "admins"]
        )
    table("", ["model", "version", "aliases", "visible to"], rows)
    if default is not None:
        reference = deployed.reference if deployed is not None else default.name
        console.print(f"default: {reference}, version {default.version}", markup=False)
    else:
        console.print(
            "no default model: finetune models promote NAME --default chooses the one for requests without a model name"
        )
    for kind in ("canary", "shadow"):
        share = getattr(deployed, kind, None)
        if share is not None:
            console.print(f"{kind}: {share.reference}, {share.percent:g} %", markup=False)


def show_manifest(manifest: Manifest) -> None:
    """Print a bundle's manifest for `finetune models show`."""
    weights = manifest.backbone["weights"]
    facts = [
        ["classes", ", ".join(manifest.classes)],
        ["backbone", f"{manifest.backbone['name']} ({manifest.backbone['n_parameters']:,} parameters)"],
        ["weights", f"{weights['identifier']}, licence {weights['license'] or 'unknown'}, sha256 {weights['sha256'] or '–'}"],
        ["method", str(manifest.method["type"])],
        [
            "input",
            f"{manifest.preprocess.input_size_px[0]}×{manifest.preprocess.input_size_px[1]} px, {manifest.preprocess.resize}",
        ],
        ["outputs", ", ".join(manifest.outputs)],
        ["activation map", manifest.cam["reason"] or "exact"],
    ]
    table(f"{manifest.name} version {manifest.version or '–'}", ["what", "value"], facts)
    _show_recorded_figures(manifest)


def _show_recorded_figures(manifest: Manifest) -> None:
    """Print the metrics recorded in a bundle, most independent split first."""
    task, figures = task_named(manifest.task), manifest.metrics
    splits = [split for split in MOST_INDEPENDENT_FIRST if f"{split}/{task.headline.key}" in figures]
    if not splits:
        return
    leading = recorded_leading(task, figures, splits[0])
    needed = {f"{splits[0]}/{name}" for name in ("n", f"{leading.key}_low", f"{leading.key}_high")}
    if needed <= figures.keys():
        value, low, high = (leading.text(figures[f"{splits[0]}/{leading.key}{end}"]) for end in ("", "_low", "_high"))
        images = EVALUATED_ON[splits[0]].format(n=int(figures[f"{splits[0]}/n"]))
        console.print(f"[bold]{leading.label} {value}[/] on {images} (95 % interval {low} to {high})")
        if leading is not task.headline:
            console.print(f"({WHY_OVER_CLASSES})", style="dim")
    rows = []
    for metric in leading_first(task, leading):
        values = [figures.get(f"{split}/{metric.key}") for split in splits]
        if len(manifest.classes) >= metric.least_classes and any(value is not None for value in values):
            rows.append([metric.label, *("–" if value is None else metric.text(value) for value in values)])
    table("", ["", *splits], rows)
