"""How results look in a terminal: plans, outcomes, evaluations, backbones, models. Rendering only."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.cli.terminal import byte_size, console, duration, table

if TYPE_CHECKING:
    from finetune.bundle.deployment import Deployment
    from finetune.bundle.manifest import Manifest
    from finetune.bundle.registry import Access, ModelVersion
    from finetune.demo import DemoResult
    from finetune.evaluation.metrics import Evaluation
    from finetune.outcome import Outcome

SHOWN_CLASSES = 40


def show_plan(plan: Mapping[str, Any]) -> None:
    """`finetune check`: data, stages, recipe, estimate, warnings."""
    data, backbone, recipe = plan["dataset"], plan["backbone"], plan["recipe"]
    splits = list(data["counts"])
    rows = [[name, *(data["counts"][split][name] for split in splits)] for name in data["classes"][:SHOWN_CLASSES]]
    totals = ["all", *(sum(data["counts"][split].values()) for split in splits)]
    table(f"Data: {data['root']}", ["class", *splits], [*rows, totals])
    if len(data["classes"]) > SHOWN_CLASSES:
        console.print(f"  … and {len(data['classes']) - SHOWN_CLASSES} more classes")
    if folds := plan["folds"]:
        sizes = sorted(sum(fold["test"].values()) for fold in folds)
        console.print(
            f"  {len(folds)} folds hold out {sizes[0]:,} to {sizes[-1]:,} images each, every image once\n", markup=False
        )
    weights = backbone["weights"]
    table(
        f"Backbone: {backbone['name']}, weights: {weights['identifier']}, licence {weights['license'] or 'unknown'}",
        ["stage", "parameters", "trains"],
        [[stage["name"], stage["n_parameters"], "yes" if stage["trains"] else "frozen"] for stage in backbone["stages"]],
    )
    phases = [
        [phase["name"], "solved" if phase["solved"] else phase["n_steps"], phase["head_lr"] or None] for phase in recipe["phases"]
    ]
    table(f"Recipe: {recipe['method']}, batch {recipe['batch_size']}", ["phase", "steps", "peak learning rate"], phases)
    table("Where each value came from", ["field", "value from"], sorted(plan["sources"].items()))
    estimate = plan["estimate"]
    costs = [["time", duration(estimate["seconds"])], ["memory", byte_size(estimate["memory_bytes"])]]
    costs += [["cache on disk", byte_size(estimate["cache_bytes"])], ["computed once", estimate["prefix"]]]
    table("Training, estimated by measuring on this machine", ["what", "about"], costs)
    _show_warnings(data["warnings"], data["quarantined"])


def show_outcome(outcome: Outcome) -> None:
    """`finetune train`: what came out, and where to look next."""
    metrics = outcome.metrics
    splits = [split for split in ("cv", "val", "test") if f"{split}/top1" in metrics]
    names = ("top1", "top5", "macro_f1", "mean_per_class_accuracy", "loss", "ece")
    table(outcome.summary, ["metric", *splits], [[name, *(metrics[f"{split}/{name}"] for split in splits)] for name in names])
    if outcome.cross_validation:
        _show_folds(outcome.cross_validation)
    cost = [
        ["wall time", duration(metrics["cost/wall_seconds"])],
        ["of which training", duration(metrics["cost/train_seconds"])],
        ["peak memory", byte_size(metrics["cost/peak_memory_bytes"])],
        ["trainable parameters", f"{metrics['cost/trainable_parameters']:,.0f} of {metrics['cost/total_parameters']:,.0f}"],
        ["bundle", byte_size(metrics["cost/bundle_bytes"])],
        ["one prediction", f"{metrics['cost/latency_seconds'] * 1000:.1f} ms on one core"],
    ]
    table("Cost", ["what", "measured"], cost)
    _show_warnings(outcome.warnings, [None] * outcome.quarantined)
    console.print(
        textwrap.dedent(f"""
        model    {outcome.model} version {outcome.version}
        report   {outcome.run / "report.html"}
        serve    finetune serve --model {outcome.model}@{outcome.version}
        promote  finetune models promote {outcome.model} {outcome.version} --default
        compare  finetune mlflow
        """),
        markup=False,
    )


def _show_folds(found: Mapping[str, Any]) -> None:
    """Each fold on what it held out, and what to expect of the model."""
    names = ("top1", "macro_f1", "loss")
    rows = [
        [
            f"fold {fold['fold']}",
            fold["n_test"],
            *(f"{fold['metrics'][f'test/{name}']:.4f}" for name in names),
            duration(fold["seconds"]),
        ]
        for fold in found["folds"]
    ]
    over, pooled = found["over_folds"], found["pooled"]
    for title, key in (("mean", "mean"), ("± sd", "standard_deviation")):
        rows.append([title, None, *(f"{over[name][key]:.4f}" for name in names), None])
    rows.append(["pooled (cv)", pooled["n"], *(f"{pooled[f'cv/{name}']:.4f}" for name in names), None])
    table("Cross-validation", ["", "held out", *names, "took"], rows)
    low, high = over["top1"]["interval"]
    console.print(
        f"Expect top1 {over['top1']['mean']:.4f} of this model, 95 % interval {low:.4f} to {high:.4f} (t over folds): it was "
        "made as the folds were, on all images.\n",
        markup=False,
    )


def show_evaluation(evaluation: Evaluation) -> None:
    """`finetune evaluate`: the figures, then the classes."""
    low, high = evaluation.top1_interval
    rows: list[list[Any]] = [
        ["top1", f"{evaluation.top1:.4f}  (95 % interval {low:.4f} to {high:.4f})"],
        [f"top{evaluation.top5_k}", f"{evaluation.top5:.4f}"],
        ["macro F1", f"{evaluation.macro_f1:.4f}"],
        ["mean per-class accuracy", f"{evaluation.mean_per_class_accuracy:.4f}"],
        ["negative log-likelihood", f"{evaluation.nll:.4f}"],
        ["expected calibration error", f"{evaluation.ece:.4f}"],
    ]
    table(f"{evaluation.n:,} images", ["metric", "value"], rows)
    classes = [[row.name, row.n, row.n_correct, row.precision, row.recall, row.f1] for row in evaluation.per_class]
    table("By class", ["class", "images", "correct", "precision", "recall", "F1"], classes)
    for true, predicted, count in evaluation.confused_pairs(5):
        console.print(f"  {count} × {true} taken for {predicted}", markup=False)


def show_backbone_names(names: Sequence[str], limit: int) -> None:
    for name in names[:limit]:
        console.print(name, markup=False)
    if len(names) > limit:
        console.print(
            f"… and {len(names) - limit:,} more; give a pattern (finetune backbones 'resnet*') or --limit {len(names)}",
            markup=False,
        )


def show_backbone(description: Mapping[str, Any]) -> None:
    """`finetune backbones NAME`: its stages from the input up, and what each method would train."""
    size = "×".join(map(str, description["input_size_px"]))
    title = f"{description['name']} at {size} px: {description['n_parameters']:,} parameters, {description['map']}"
    stages = [
        [stage["index"], stage["name"], stage["n_parameters"], "×".join(map(str, stage["output_shape"]))]
        for stage in description["stages"]
    ]
    table(title, ["#", "stage", "parameters", "output"], stages)
    choices = [
        [choice["method"], ", ".join(choice["trains"]) or "nothing", choice["n_parameters"], f"{choice['fraction']:.1%}"]
        for choice in description["choices"]
    ]
    table("What each method trains, besides the head", ["method", "stages", "parameters", "share"], choices)
    if description["note"]:
        console.print(description["note"], markup=False)


def show_models(
    versions: Sequence[ModelVersion],
    access: Mapping[str, Access],
    default: ModelVersion | None,
    deployed: Deployment | None,
) -> None:
    """`finetune models list`: versions, what their aliases are, who may use them, and what answers by default."""
    if not versions:
        console.print("no model yet: finetune train --data FOLDER makes one, finetune demo shows the whole way")
        return
    rows = []
    for version in versions:
        aliases = [*version.aliases, *(["default"] if default is not None and default.path == version.path else [])]
        who = access[version.name]
        rows.append(
            [version.name, version.version, ", ".join(aliases), "all" if who.visibility == "shared" else who.owner or "admins"]
        )
    table("", ["model", "version", "aliases", "for"], rows)
    if default is not None:
        reference = deployed.reference if deployed is not None else default.name
        console.print(f"default: {reference}, version {default.version}", markup=False)
    else:
        console.print("no default: finetune models promote NAME --default chooses what the server answers with")
    for kind in ("canary", "shadow"):
        share = getattr(deployed, kind, None)
        if share is not None:
            console.print(f"{kind}: {share.reference}, {share.percent:g} %", markup=False)


def show_manifest(manifest: Manifest) -> None:
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
        *([key, f"{value:.4f}"] for key, value in manifest.metrics.items()),
    ]
    table(f"{manifest.name} version {manifest.version or '–'}", ["what", "value"], facts)


def show_demo(result: DemoResult) -> None:
    """Both runs side by side, the answer over HTTP, and where to look next."""
    rows = [
        [method, outcome.metrics["val/top1"], outcome.metrics.get("test/top1"), duration(outcome.metrics["cost/wall_seconds"])]
        for method, outcome in result.runs.items()
    ]
    table("Two ways to fine-tune", ["method", "val top1", "test top1", "wall time"], rows)
    console.print(
        f"served {result.served}, asked it over HTTP for {result.asked.name}, which shows {result.truth!r}:", markup=False
    )
    for row in result.answer["predictions"]:
        console.print(f"  {row['probability']:7.2%}  {row['label']}", markup=False)
    served = result.runs[result.served]
    console.print(
        textwrap.dedent(f"""
        all of it took {duration(result.seconds)}. Where to look next:
          report    {served.run / "report.html"}
          compare   make mlflow      (then open http://127.0.0.1:5000)
          serve     make serve       (then open http://127.0.0.1:3000)
          your own  finetune train --data FOLDER_OF_CLASS_FOLDERS
        """),
        markup=False,
    )


def _show_warnings(warnings: Sequence[str], quarantined: Sequence[Any]) -> None:
    for warning in warnings:
        console.print(f"[yellow]note[/] {warning}")
    if quarantined:
        console.print(f"[yellow]note[/] {len(quarantined)} unreadable files were left out")
    for bad in quarantined[:5]:
        if bad is not None:
            console.print(f"     {bad['file']}: {bad['reason']}", markup=False)
