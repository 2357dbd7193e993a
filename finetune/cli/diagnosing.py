"""`diagnose`: find out what is wrong with a run, from its own records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from finetune.cli.training import json_option

if TYPE_CHECKING:
    from finetune.storage.rundir import RunDir


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--against",
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="A run on the same data that is shallower or has more frozen stages, to compare the training errors.",
)
@click.option(
    "--check-preprocessing",
    is_flag=True,
    help="Test whether the pixel normalisation fits the pretrained weights, if the run did not (takes seconds).",
)
@json_option
def diagnose(run: Path, against: Path | None, check_preprocessing: bool, as_json: bool) -> None:
    """Find out what is wrong with a run, from its records.

    RUN is the folder of a run, finished or not. Each finding has evidence, a confidence and advice. The checks cover
    overfitting, underfitting, degradation, vanishing and exploding gradients, dead units, learning rates, shuffled labels,
    leakage between splits, classes that are never predicted, stages frozen by accident, and wrong preprocessing.

    \b
    finetune diagnose .finetune/runs/photos-full-1a2b3c4d
    finetune diagnose .finetune/runs/deep --against .finetune/runs/shallow
    """
    from finetune.cli.show_diagnosis import show_diagnosis
    from finetune.cli.terminal import print_json
    from finetune.evaluation.diagnose import diagnose as diagnose_run
    from finetune.storage.rundir import RunDir, kept_run

    if check_preprocessing:
        _measure_preprocessing(kept_run(RunDir(run.absolute())), as_json)
    found = diagnose_run(run, against)
    print_json(found.to_dict()) if as_json else show_diagnosis(found)


def _measure_preprocessing(run: RunDir, as_json: bool) -> None:
    from finetune.progress_bars import progress_bars
    from finetune.runs.preprocessing import measure_finished_run
    from finetune.runs.shared import Shared
    from finetune.storage.workspace import Workspace

    with progress_bars(shown=not as_json) as progress:
        measure_finished_run(run, Shared.of(Workspace.from_environment()), progress)
