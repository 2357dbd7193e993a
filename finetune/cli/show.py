"""Print results in a terminal: plans, outcomes, evaluations, backbones, models."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from finetune.cli.terminal import shortened, table
from finetune.data.dataset import left_out_files
from finetune.doctor.finding import not_in
from finetune.evaluation.diagnose import read_diagnosis
from finetune.evaluation.evaluate import UNSEEN, Evaluation, read_evaluation
from finetune.events import Planned
from finetune.messages import byte_size, duration, natural_list, plural, printable
from finetune.metrics import Metric
from finetune.progress_bars import console
from finetune.storage.files import read_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.tasks import TASKS, task_named
from finetune.tasks.leading import WHY_OVER_CLASSES, leading_first, recorded_leading

if TYPE_CHECKING:
    from finetune.bundle.deployment import Deployment
    from finetune.bundle.manifest import Manifest
    from finetune.bundle.registry import Access, ModelVersion
    from finetune.demo import DemoResult
    from finetune.doctor.finding import Examination
    from finetune.evaluation.of_bundle import BundleEvaluation
    from finetune.model.tried import Trial
    from finetune.runs.outcome import Outcome

SHOWN_CLASSES = 40
SHOWN_WORST = 5
MOST_INDEPENDENT_FIRST = ("cv", "test_unseen", "test", "val_unseen", "val")  # val last, since the epoch was chosen on it
EVALUATED_ON = {
    "cv": "{n:,} images, each by a model that had not seen it",
    "test": "{n:,} test images",
    "val": "{n:,} val images, on which the weights were chosen too",
    "test_unseen": "the {n:,} test images that it was not trained on",
    "val_unseen": "the {n:,} val images that it was not trained on, on which the weights were chosen too",
}


def show_plan(plan: Mapping[str, Any], examination: Examination | None = None) -> None:
    """Print the plan for `finetune check`: data, stages, recipe, estimate, warnings.

    Args:
        examination: of the same data, which is printed afterwards; notes that repeat its findings are left out.
    """
    data, backbone, recipe = plan["dataset"], plan["backbone"], plan["recipe"]
    splits = list(data["counts"])
    rows = [[name, *(data["counts"][split][name] for split in splits)] for name in data["classes"][:SHOWN_CLASSES]]
    totals = ["all images", *(data["sizes"].get(split, 0) for split in splits)]
    exclusive = task_named(plan["task"]).exclusive
    table(f"Data: {data['root']}", ["class" if exclusive else "label", *splits], [*rows, totals])
    if len(data["classes"]) > SHOWN_CLASSES:
        console.print(f"  … and {len(data['classes']) - SHOWN_CLASSES} more {'classes' if exclusive else 'labels'}")
    if folds := plan["folds"]:
        sizes = sorted(plan["fold_sizes"])
        each = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
        console.print(f"  {len(folds)} folds hold out {each} images each, every image once\n", markup=False)
    weights = backbone["weights"]
    licence = "" if weights["source"] == "none" else f", licence {weights['license'] or 'unknown'}"
    table(
        f"Backbone: {backbone['name']}, weights: {weights['identifier']}{licence}",
        ["stage", "parameters", "trains"],
        [[stage["name"], stage["n_parameters"], "yes" if stage["trains"] else "frozen"] for stage in backbone["stages"]],
    )
    phases = [
        [phase["name"], "solved" if phase["solved"] else phase["n_steps"], phase["head_lr"] or None] for phase in recipe["phases"]
    ]
    batch = f", batch {recipe['batch_size']}" if any(phase["n_steps"] for phase in recipe["phases"]) else ""
    table(f"Recipe: {recipe['method']}{batch}", ["phase", "steps", "peak learning rate"], phases)
    table("Settings", ["field", "value", "why"], _decisions(plan["values"], plan["sources"]))
    estimate = plan["estimate"]
    whole = plan["forecast"]
    costs = [["training alone", duration(estimate["seconds"])], ["memory", byte_size(estimate["memory_bytes"])]]
    if whole:
        about, low, high = (duration(whole[name]) for name in ("about", "low", "high"))
        costs = [["whole job, nothing cached", f"{about} ({low} to {high})"], *costs]
    costs += [["cache on disk", byte_size(estimate["cache_bytes"])], ["frozen features", estimate["prefix"]]]
    table("Estimated by measurements on this machine", ["what", "about"], costs)
    quarantined = () if examination and examination.of("unreadable", "missing_files") else data["quarantined"]
    show_notes(data["understood"], not_in(examination, data["warnings"]) if examination else data["warnings"], quarantined)
    console.print(f"data revision {data['revision'][:12]} (with data.revision, a job refuses any other data)", markup=False)


def _decisions(values: Mapping[str, Any], sources: Mapping[str, str]) -> list[list[str]]:
    """Return a row for each value, below a row with its section's name: full key paths would be too wide."""
    rows, section = [], ""
    for path in sorted((path for path in values if values[path] is not None), key=lambda path: (path.rpartition(".")[0], path)):
        inside, _, field = path.rpartition(".")
        if inside != section:
            section = inside
            rows.append([section, "", ""])
        value, why = _value(values[path]), sources.get(path, "")
        rows.append([f"  {field}" if inside else field, value, "" if why == value else why])
    return rows


def show_outcome(outcome: Outcome, run: RunDir) -> None:
    """Print the outcome for `finetune train`: metrics, most independent split first, costs, and what to do next."""
    evaluation = read_evaluation(run.evaluation)
    splits = [split for split in MOST_INDEPENDENT_FIRST if split in evaluation.evaluations]
    first = evaluation.evaluations[splits[0]]
    console.print(f"\n{outcome.summary}\n", markup=False)
    _show_headline(first, EVALUATED_ON[splits[0]])
    _show_figures({split: evaluation.evaluations[split] for split in splits})
    for split in splits:
        if split.endswith(UNSEEN):
            whole = split.removesuffix(UNSEEN)
            n_seen = evaluation.evaluations[whole].n - evaluation.evaluations[split].n
            console.print(
                f"[yellow]note[/] {n_seen:,} {whole} images are in the training data too (the same file, a near duplicate, or "
                f"one of a group), so {whole} figures are too high; {split} figures leave these images out.\n"
            )
    if "val" in splits[1:]:
        console.print("The weights were chosen on the val images, so val figures are somewhat too high.\n")
    data = read_json(run.resolved)["dataset"] if run.resolved.exists() else {}
    show_notes(data.get("understood", ()), outcome.warnings, data.get("quarantined", ()), named=False)
    _show_worst_classes(splits[0], first)
    if outcome.cross_validation:
        _show_folds(outcome.cross_validation)
    show_cost(outcome.cost, run)
    show_findings(run)
    lines = [f"report    {shortened(run.report)}"]
    if outcome.model is not None:
        reference = f"{outcome.model}@{outcome.version}"
        lines = [
            f"model     {reference}",
            *lines,
            f"predict   finetune predict some.jpg --model {reference}",
            f"serve     finetune serve --model {reference}",
            f"promote   finetune models promote {outcome.model} {outcome.version} --default",
            "runs      finetune mlflow",
        ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def show_findings(run: RunDir) -> None:
    """Print the findings of the diagnosis, each with what to try first, and the command that shows all of it.

    Of a study, the diagnosis of the run whose model it kept is shown. Notes are shown if there is no problem.
    """
    from finetune.studies.study import kept_run

    found = read_diagnosis(run) or read_diagnosis(kept_run(run))
    if found is None:
        return
    causes = [finding for finding in found.problems or found.findings if finding.caused_by is None]
    for finding in causes:
        advice = f" Try: {finding.advice[0]}." if finding.advice else ""
        console.print(f"[yellow]{escape(finding.title)}[/] ({finding.certainty}): {escape(finding.sentence)}.{escape(advice)}")
    if causes:
        console.print(f"diagnosis finetune diagnose {shortened(run.root)}\n", markup=False, soft_wrap=True)


def _show_headline(evaluation: Evaluation, images: str) -> None:
    """Print the first metric with its images and its 95 % interval."""
    metric = evaluation.leading
    low, high = (metric.text(bound) for bound in evaluation.intervals[metric.key])
    value = f"[bold]{metric.label} {metric.text(evaluation.values[metric.key])}[/]"
    console.print(f"{value} on {images.format(n=evaluation.n)} (95 % interval {low} to {high})")
    if evaluation.why_leading:
        console.print(f"({evaluation.why_leading})", style="dim")


def _show_figures(evaluations: Mapping[str, Evaluation]) -> None:
    """Print all metrics, one column per split."""
    first = next(iter(evaluations.values()))
    rows = [
        ["images", *(f"{found.n:,}" for found in evaluations.values())],
        *([metric.label, *(metric.text(found.values[metric.key]) for found in evaluations.values())] for metric in first.shown),
    ]
    if "labels_per_image" in first.facts:
        rows += [
            [title, *(f"{found.facts[name]:.2f}" for found in evaluations.values())]
            for name, title in (("labels_per_image", "labels per image"), ("labels_given_per_image", "labels given per image"))
        ]
    table("", ["", *evaluations], rows)


def _show_worst_classes(split: str, evaluation: Evaluation) -> None:
    """Print the classes with the lowest recall, and the classes without images."""
    measured = sorted((row for row in evaluation.per_class if row.recall is not None), key=lambda row: (row.recall, row.name))
    if len(measured) > 1 and measured[0].recall != 1.0:
        worst = [
            [row.name, row.n, f"{row.recall:.0%}", _percents(row.intervals.get("recall")), _percent(row.precision)]
            for row in measured[:SHOWN_WORST]
        ]
        head = ["class", "images", "recall", "95 % interval", "precision"]
        table(f"Classes with the lowest recall ({split})", head, worst)
    if evaluation.absent:
        console.print(
            f"[yellow]note[/] {split} has no image of {escape(natural_list(evaluation.absent))}: these classes are not "
            f"measured, and "
            "means over classes leave them out"
        )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _percents(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.0%} to {interval[1]:.0%}"


def show_cost(cost: Mapping[str, float], run: RunDir) -> None:
    """Print the costs of a run, those of its interrupted attempts included."""
    rows = [
        ["this run in all, wall time", duration(cost["wall_seconds"])],
        ["training, without cached features", duration(cost["train_seconds"])],
        ["  of which frozen features", duration(cost["feature_seconds"])],
        ["peak memory", byte_size(cost["peak_memory_bytes"])],
        ["trainable parameters", f"{cost['trainable_parameters']:,.0f} of {cost['total_parameters']:,.0f}"],
    ]
    if "bundle_bytes" in cost:
        rows += [
            ["bundle", byte_size(cost["bundle_bytes"])],
            ["one prediction", f"{cost['latency_seconds'] * 1000:.1f} ms on one core"],
        ]
    n_attempts = sum(event["kind"] == Planned.kind for event in read_lines(run.events))
    table(f"Cost, {n_attempts} attempts together" if n_attempts > 1 else "Cost", ["what", "measured"], rows)
    if cost["train_seconds"] > cost["wall_seconds"]:
        console.print(
            "An earlier run computed frozen features that this run took from the cache. Training counts the time that they "
            "took then, so that the costs of runs can be compared.\n"
        )


def _show_folds(found: Mapping[str, Any]) -> None:
    """Print the metrics of each fold on its held-out images, and their mean and interval."""
    over, pooled = found["over_folds"], found["pooled"]
    task = next(task for task in TASKS if task.headline.key in over)
    headline = recorded_leading(task, pooled, "cv")
    names = tuple(dict.fromkeys((headline.key, task.headline.key, "macro_f1", "loss")))
    rows = [
        [
            f"fold {fold['fold']}",
            fold["n_test"],
            *(f"{fold['metrics'][f'test/{name}']:.4f}" for name in names),
            duration(fold["seconds"]),
        ]
        for fold in found["folds"]
    ]
    for title, key in (("mean", "mean"), ("± sd", "standard_deviation")):
        rows.append([title, None, *(f"{over[name][key]:.4f}" for name in names), None])
    rows.append(["pooled (cv)", pooled["n"], *(f"{pooled[f'cv/{name}']:.4f}" for name in names), None])
    titles = [headline.label if headline is not task.headline and name == headline.key else name for name in names]
    table("Cross-validation", ["", "held out", *titles, "took"], rows)
    low, high = (headline.text(bound) for bound in over[headline.key]["interval"])
    console.print(
        f"Expect {headline.label} {headline.text(over[headline.key]['mean'])} of this model, 95 % interval {low} to {high} "
        "(Student's t over the folds): it was made as they were, on all images.\n",
        markup=False,
    )


def show_comparison(found: Mapping[str, Any], report: str) -> None:
    """Print a comparison for `finetune compare`: arms, differences, verdict, and where the page is.

    Args:
        found: the content of ``comparison.json``, which is also a server's document.
        report: path or URL of the page.
    """
    _show_arms(found)
    _show_verdict(found)
    lines = [f"report    {report}"]
    if found["registered"]:
        lines += [f"model     {found['registered']}", f"serve     finetune serve --model {found['registered']}"]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _show_verdict(found: Mapping[str, Any]) -> None:
    console.print(f"\n[bold]{escape(found['verdict']['sentence'])}[/]\n")


def _show_arms(found: Mapping[str, Any]) -> None:
    """Print a table of the arms, a table of the pairs, and notes on them."""
    key, split = found["headline"], found["split"]
    metric = task_metric(key.removeprefix(f"{split}/"))
    _show_leading_of_arms(found)
    rows = []
    for arm in found["arms"]:
        figure, training = arm["metrics"][key], duration(arm["cost"]["train_seconds"])
        low, high, sd = figure["low"], figure["high"], figure["sd"]
        interval = "" if low is None or high is None else f"{metric.text(low)} – {metric.text(high)}"
        spread = "–" if sd is None else f"± {100 * sd:.1f}" if metric.percent else f"± {sd:.3f}"
        name = f"{'▸' if arm['name'] == found['verdict']['choose'] else ' '} {arm['name']}"
        rows.append([name, len(arm["runs"]), metric.text(figure["value"]), interval, spread, training])
    n = found["arms"][0]["metrics"][key]["n"]
    table(f"{metric.label} on {n:,} {split} images", ["arm", "runs", "mean", "95 % interval", "sd", "training"], rows)
    scale = 100 if metric.percent else 1
    pairs = [
        [
            f"{pair['a']} − {pair['b']}",
            f"{scale * pair['difference']:+.1f}",
            f"{scale * pair['low']:+.1f} to {scale * pair['high']:+.1f}",
            f"{pair['p_adjusted']:.2g}",
            "–" if pair["smallest_detectable"] is None else f"{scale * pair['smallest_detectable']:.1f}",
            f"{pair['a'] if pair['difference'] > 0 else pair['b']} better" if pair["outcome"] == "better" else pair["outcome"],
        ]
        for pair in found["pairs"]
        if pair["metric"] == key
    ]
    unit = "points" if metric.percent else metric.label
    table(f"Differences in {unit}", ["pair", "difference", "95 % interval", "p", "detectable", "verdict"], pairs)
    for arm in found["arms"]:
        if arm["note"]:
            console.print(f"[yellow]note[/] {escape(arm['name'])}: {escape(arm['note'])}")
    if found["left_out"]:
        console.print(f"[yellow]note[/] {found['left_out']:,} images are left out: one of the runs had trained or chosen on them")


def _show_leading_of_arms(found: Mapping[str, Any]) -> None:
    """Print the leading metric of each arm, if it is another one than the headline."""
    leading = found.get("leading", found["headline"])
    if leading == found["headline"]:
        return
    metric = task_metric(leading.partition("/")[2])
    rows = []
    for arm in found["arms"]:
        figure = arm["metrics"][leading]
        low, high = (None if bound is None else metric.text(bound) for bound in (figure["low"], figure["high"]))
        rows.append([arm["name"], metric.text(figure["value"]), "–" if low is None else f"{low} – {high}"])
    table(f"{metric.label} ({found['split']})", ["arm", "mean", "95 % interval"], rows)
    console.print(
        f"({WHY_OVER_CLASSES}; arms are tested by {task_metric(found['headline'].partition('/')[2]).label})", style="dim"
    )


def task_metric(key: str) -> Metric[Any]:
    """Return the metric with this key."""
    return next(metric for task in TASKS for metric in task.metrics if metric.key == key)


def show_evaluation(found: BundleEvaluation) -> None:
    """Print an evaluation for `finetune evaluate`: whether the model has seen the images, then metrics, then classes."""
    evaluation = found.evaluation
    if found.n_trained_on is None:
        console.print("[yellow]note[/] this bundle does not record its training images; some of these images may be among them")
    elif found.n_trained_on or found.n_chosen_on:
        console.print(
            f"[yellow]note[/] the model was trained on {found.n_trained_on:,} of these {plural(evaluation.n, 'image')}, and "
            f"its weights were chosen on {found.n_chosen_on:,}, so the figures on all images are too high"
        )
    if found.unseen is not None:
        _show_headline(found.unseen, "the {n:,} others")
    _show_headline(evaluation, "all {n:,} images" if found.unseen else "{n:,} images")
    _show_figures({"all": evaluation, **({"others": found.unseen} if found.unseen else {})})
    classes: list[list[Any]] = [
        [row.name, row.n, row.n_correct, *(_ratio(value) for value in (row.precision, row.recall, row.f1))]
        for row in evaluation.per_class
        if row.n
    ]
    head = ["class", "images", "correct", "precision", "recall", "F1"]
    if any(row.average_precision is not None for row in evaluation.per_class):
        head.append("AP")
        for cells, row in zip(classes, (row for row in evaluation.per_class if row.n), strict=True):
            cells.append(_ratio(row.average_precision))
    table("By class", head, classes)
    if evaluation.absent:
        console.print(f"No image of {escape(natural_list(evaluation.absent))}: means over classes leave them out")
    for true, predicted, count in evaluation.confused_pairs(5):
        console.print(f"{count} × {true} taken for {predicted}", markup=False)
    for bad in found.unreadable[:5]:
        console.print(f"[yellow]note[/] left out, {escape(printable(bad.sample.id))}: {escape(bad.error.message)}")


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def show_backbone_names(names: Sequence[str], limit: int) -> None:
    """Print at most `limit` names, and how many more there are."""
    for name in names[:limit]:
        console.print(name, markup=False)
    if len(names) > limit:
        console.print(
            f"… and {len(names) - limit:,} more; give a pattern (finetune backbones 'resnet*') or --limit {len(names)}",
            markup=False,
        )


def show_trials(trials: Mapping[str, Trial], n_names: int) -> None:
    """Print for `finetune backbones` the results of trying one small member of each family."""
    maps = {"linear": "exact", "layernorm": "exact"}
    rows = [
        [
            trial.backbone,
            "yes" if trial.works else "no",
            trial.n_stages or "–",
            maps.get(trial.cam_kind or "", "none") if trial.n_stages else "–",
            trial.input_size_px or "–",
            f"{trial.n_parameters / 1e6:.1f} M" if trial.n_parameters else "–",
            f"{trial.milliseconds:.0f}" if trial.works else "–",
        ]
        for trial in trials.values()
    ]
    title = f"The smallest of {len(rows)} families, tried with random weights: frozen, trained, exported, compared with torch"
    table(title, ["backbone", "works", "stages", "map", "px", "size", "ms"], rows)
    console.print("map: class activation map; ms: CPU time of one image on one core\n", markup=False)
    for trial in trials.values():
        if not trial.works:
            console.print(f"{trial.backbone}: {trial.reason}", markup=False)
    console.print(f"{n_names:,} names in all: finetune backbones 'resnet*' lists those that match", markup=False)


def show_backbone(description: Mapping[str, Any]) -> None:
    """Print for `finetune backbones NAME` the stages from the stem up, and what each method would train."""
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
    table("", ["model", "version", "aliases", "for"], rows)
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


def show_demo(result: DemoResult) -> None:
    """Print the demo's comparison, the chosen model's prediction over HTTP, the verdict, and what to do next."""
    found = result.comparison.to_dict()
    _show_arms(found)
    asked = f"{found['registered']} was served and asked over HTTP for {result.asked.name}, which shows {result.truth!r}:"
    console.print(asked, markup=False)
    for row in result.answer["predictions"]:
        console.print(f"  {row['probability']:7.2%}  {row['label']}", markup=False)
    _show_verdict(found)
    console.print(
        textwrap.dedent(f"""
        all of it took {duration(result.seconds)}. Where to look next:
          report    {shortened(result.comparison.report)}
          runs      make mlflow      (then open http://127.0.0.1:5000)
          serve     make serve       (then open http://127.0.0.1:3000)
          your own  finetune compare FOLDER_OF_CLASS_FOLDERS
        """),
        markup=False,
    )


def show_notes(
    understood: Sequence[str], warnings: Sequence[str], quarantined: Sequence[Mapping[str, str]], *, named: bool = True
) -> None:
    """Print how the data was read, warnings about it, and the files that were left out.

    Args:
        quarantined: file and reason of each.
        named: name the first of these files, else count them.
    """
    for sentence in understood:
        console.print(f"[cyan]read[/] {escape(sentence)}")
    for warning in warnings:
        console.print(f"[yellow]note[/] {escape(warning)}")
    if quarantined:
        where = "" if named else " (finetune check names them)"
        console.print(f"[yellow]note[/] left out: {left_out_files(bad['reason'] for bad in quarantined)}{where}")
    for bad in quarantined[:5] if named else ():
        console.print(f"     {printable(bad['file'])}: {bad['reason']}", markup=False)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
