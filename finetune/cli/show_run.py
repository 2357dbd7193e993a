"""Print the outcome of a run in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from finetune.bundle.registry import Registry
from finetune.cli.show_evaluation import EVALUATED_ON, show_figures, show_headline
from finetune.cli.show_plan import show_notes
from finetune.cli.terminal import shortened, table
from finetune.errors import NotFound
from finetune.evaluation.diagnose import read_diagnosis
from finetune.evaluation.evaluate import MOST_INDEPENDENT_FIRST, UNSEEN, Evaluation, read_evaluation
from finetune.evaluation.folds import FoldScore
from finetune.events import Planned
from finetune.messages import byte_size, duration, natural_list
from finetune.progress_bars import console
from finetune.storage.files import read_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.tasks import TASKS
from finetune.tasks.leading import recorded_leading
from finetune.tracking.mirror import read_state

if TYPE_CHECKING:
    from finetune.runs.outcome import Outcome

SHOWN_WORST = 5


def show_outcome(outcome: Outcome, run: RunDir, registry: Registry) -> None:
    """Print the outcome for `finetune train`: metrics, most independent split first, costs, and what to do next."""
    evaluation = read_evaluation(run.evaluation)
    splits = [split for split in MOST_INDEPENDENT_FIRST if split in evaluation.evaluations]
    first = evaluation.evaluations[splits[0]]
    console.print(f"\n{outcome.summary}\n", markup=False)
    show_headline(first, EVALUATED_ON[splits[0]])
    show_figures({split: evaluation.evaluations[split] for split in splits})
    for split in splits:
        if split.endswith(UNSEEN):
            whole = split.removesuffix(UNSEEN)
            n_seen = evaluation.evaluations[whole].n - evaluation.evaluations[split].n
            images, data = (f"{whole} images", "the training data") if whole != "cv" else ("images", "their fold's training data")
            console.print(
                f"[yellow]note[/] {n_seen:,} {images} are in {data} too (the same file, a near duplicate, or one of a group), so "
                f"{whole} figures are too high; {split} figures leave these images out.\n"
            )
    if "val" in splits[1:]:
        console.print("The weights were chosen on the val images, so val figures are somewhat too high.\n")
    data = read_json(run.resolved)["dataset"] if run.resolved.exists() else {}
    show_notes(data.get("understood", ()), outcome.warnings, data.get("quarantined", ()), named=False)
    _show_worst_classes(splits[0], first)
    if outcome.cross_validation:
        _show_folds(outcome.cross_validation, copies="cv_unseen" in splits)
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
            f"default   {reference} answers requests without a model name"
            if _is_default(outcome, registry)
            else f"promote   finetune models promote {outcome.model} {outcome.version} --default",
        ]
        if read_state(run, "mlflow") is not None:
            lines.append("runs      finetune mlflow")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _is_default(outcome: Outcome, registry: Registry) -> bool:
    """Return whether the model of a run is the default already, so that it need not be promoted."""
    try:
        default = registry.default()
    except NotFound:
        return False
    return (default.name, default.version) == (outcome.model, outcome.version)


def show_findings(run: RunDir) -> None:
    """Print the findings of the diagnosis, each with what to try first, and the command that shows all of it.

    Of a study, the diagnosis of the run whose model it kept is shown. Notes are shown if there is no problem.
    """
    from finetune.storage.rundir import kept_run

    found = read_diagnosis(run) or read_diagnosis(kept_run(run))
    if found is None:
        return
    causes = [finding for finding in found.problems or found.findings if finding.caused_by is None]
    for finding in causes:
        advice = f" Try: {finding.advice[0]}." if finding.advice else ""
        console.print(f"[yellow]{escape(finding.title)}[/] ({finding.certainty}): {escape(finding.sentence)}.{escape(advice)}")
    if causes:
        console.print(f"diagnosis finetune diagnose {shortened(run.root)}\n", markup=False, soft_wrap=True)


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


def _show_folds(found: Mapping[str, Any], *, copies: bool) -> None:
    """Print the metrics of each fold on its held-out images, and their mean and interval.

    Args:
        copies: whether held-out images are near duplicates of training images of their fold.
    """
    over, pooled = found["over_folds"], found["pooled"]
    task = next(task for task in TASKS if task.headline.key in over)
    headline = recorded_leading(task, pooled, "cv")
    names = tuple(dict.fromkeys((headline.key, task.headline.key, "macro_f1", "loss")))
    rows = [
        [
            f"fold {fold.fold}",
            fold.n_held_out,
            *(f"{fold.held_out(name):.4f}" for name in names),
            duration(fold.seconds),
        ]
        for fold in (FoldScore(**one) for one in found["folds"])
    ]
    for title, key in (("mean", "mean"), ("± sd", "standard_deviation")):
        rows.append([title, None, *(f"{over[name][key]:.4f}" for name in names), None])
    rows.append(
        [f"pooled (cv){', with near duplicates' * copies}", pooled["n"], *(f"{pooled[f'cv/{name}']:.4f}" for name in names), None]
    )
    titles = [headline.label if headline is not task.headline and name == headline.key else name for name in names]
    table("Cross-validation", ["", "held out", *titles, "took"], rows)
    low, high = (headline.text(bound) for bound in over[headline.key]["interval"])
    console.print(
        f"Expect {headline.label} {headline.text(over[headline.key]['mean'])} of this model, 95 % interval {low} to {high} "
        "(Student's t over the folds): it was trained like their models, on all images."
        f"{' Near duplicates of training images are left out of it.' * copies}\n",
        markup=False,
    )
