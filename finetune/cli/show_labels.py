"""Print a labels study in a terminal of 80 columns."""

from __future__ import annotations

import textwrap

from finetune.cli.terminal import shortened, table
from finetune.messages import natural_list
from finetune.progress_bars import console
from finetune.studies.labels import LabelsStudy
from finetune.studies.labels.study import rows_of

WIDTH = 78


def show_labels(found: LabelsStudy) -> None:
    """Print the conclusion, the measurements, the projections, and the path of the page."""
    console.print()
    for line in textwrap.wrap(found.sentence, WIDTH):
        console.print(line, style="bold", markup=False)
    console.print()
    curve = found.curve
    rows = [
        [size, f"{1 - mean:.1%}", f"± {100 * error:.1f}"]
        for size, mean, error in zip(curve.sizes, curve.mean, curve.standard_errors, strict=True)
    ]
    table("Measured", ["training images", found.metric_label, "standard error"], rows)
    table(
        "Estimated gain from more images",
        ["more per class" if found.per_class else "more images", "training images", "gain, points", "95 % interval", "then"],
        rows_of(found),
    )
    if found.too_far:
        console.print(
            f"too many for an estimate: {natural_list(f'{one:,}' for one in found.too_far)} {found.more_label}", markup=False
        )
    if found.page is not None:
        console.print(f"page      {shortened(found.page)}", markup=False, soft_wrap=True)
