"""Print the plan of a job in a terminal, and how its data was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from finetune.cli.terminal import table
from finetune.data.dataset import left_out_files
from finetune.doctor.finding import not_in
from finetune.messages import byte_size, duration, plural, printable
from finetune.progress_bars import console
from finetune.tasks import task_named

if TYPE_CHECKING:
    from finetune.doctor.finding import Examination


SHOWN_CLASSES = 40


def show_plan(plan: Mapping[str, Any], examination: Examination | None = None) -> None:
    """Print the plan for `finetune check`: data, stages, recipe, estimate, warnings.

    Args:
        examination: of the same data, which is printed afterwards; notes that repeat its findings are left out.
    """
    data, backbone, recipe = plan["dataset"], plan["backbone"], plan["recipe"]
    splits = list(data["counts"])
    rows = [[name, *(data["counts"][split][name] for split in splits)] for name in data["classes"][:SHOWN_CLASSES]]
    totals = ["all images", *(data["sizes"].get(split, 0) for split in splits)]
    noun = task_named(plan["task"]).noun
    table(f"Data: {data['root']}", [noun, *splits], [*rows, totals])
    if len(data["classes"]) > SHOWN_CLASSES:
        console.print(f"  … and {plural(len(data['classes']) - SHOWN_CLASSES, f'more {noun}')}")
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


def show_notes(
    understood: Sequence[str], warnings: Sequence[str], quarantined: Sequence[Mapping[str, str]], *, named: bool = True
) -> None:
    """Print how the data was read, warnings about it, and the files that were left out.

    Args:
        quarantined: file and reason of each.
        named: whether to name the first of these files; otherwise they are only counted.
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
