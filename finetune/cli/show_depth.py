"""Print a depth study in a terminal of 80 columns."""

from __future__ import annotations

import textwrap

from finetune.cli.terminal import shortened, table
from finetune.progress_bars import console
from finetune.studies.depth.result import DepthStudy, headline, paragraphs

WIDTH = 78


def show_depth(found: DepthStudy) -> None:
    """Print the conclusion, a table of the networks, the observations, and the path of the page."""
    console.print()
    for line in textwrap.wrap(headline(found), WIDTH):
        console.print(line, style="bold", markup=False)
    rows = [
        [
            one.network.name,
            f"{one.train_error:.1%}",
            f"{one.val_error:.1%}",
            f"10^{one.decades:+.1f}" if one.decades is not None else "zero" if one.gradients else "–",
            one.findings[0].replace("_", " ") if one.findings else "–",
        ]
        for one in found.networks
    ]
    console.print()
    table("", ["network", "train error", "val error", "gradient", "first finding"], rows)
    for text in paragraphs(found):
        for line in textwrap.wrap(text, WIDTH, break_on_hyphens=False):
            console.print(line, markup=False)
        console.print()
    console.print(f"report    {shortened(found.report)}", markup=False, soft_wrap=True)
