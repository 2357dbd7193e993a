"""Print evaluations in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from finetune.cli.terminal import table
from finetune.evaluation.evaluate import Evaluation
from finetune.messages import natural_list, plural, printable
from finetune.progress_bars import console

if TYPE_CHECKING:
    from finetune.evaluation.of_bundle import BundleEvaluation


EVALUATED_ON = {
    "cv": "{n:,} images, each by a model that had not seen it",
    "cv_unseen": "the {n:,} images without a near duplicate in their fold's training images",
    "test": "{n:,} test images",
    "val": "{n:,} val images, on which the weights were chosen too",
    "test_unseen": "the {n:,} test images that it was not trained on",
    "val_unseen": "the {n:,} val images that it was not trained on, on which the weights were chosen too",
}


def show_headline(evaluation: Evaluation, images: str) -> None:
    """Print the first metric with its images and its 95 % interval."""
    metric = evaluation.leading
    low, high = (metric.text(bound) for bound in evaluation.intervals[metric.key])
    value = f"[bold]{metric.label} {metric.text(evaluation.values[metric.key])}[/]"
    console.print(f"{value} on {images.format(n=evaluation.n)} (95 % interval {low} to {high})")
    if evaluation.why_leading:
        console.print(f"({evaluation.why_leading})", style="dim")


def show_figures(evaluations: Mapping[str, Evaluation]) -> None:
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


def show_evaluation(found: BundleEvaluation) -> None:
    """Print an evaluation for `finetune evaluate`: the model, whether it has seen the images, metrics, then classes."""
    evaluation = found.evaluation
    console.print(f"model {found.model}", style="dim", markup=False)
    if found.n_trained_on is None:
        console.print("[yellow]note[/] this bundle does not record its training images; some of these images may be among them")
    elif found.n_trained_on or found.n_chosen_on:
        console.print(
            f"[yellow]note[/] the model was trained on {found.n_trained_on:,} of these {plural(evaluation.n, 'image')}, and "
            f"its weights were chosen on {found.n_chosen_on:,}, so the figures on all images are too high"
        )
    if found.unseen is not None:
        show_headline(found.unseen, "the {n:,} others")
    show_headline(evaluation, "all {n:,} images" if found.unseen else "{n:,} images")
    show_figures({"all": evaluation, **({"others": found.unseen} if found.unseen else {})})
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
