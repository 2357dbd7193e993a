"""Options of the commands that train: what follows their runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from finetune.storage.rundir import RunDir
    from finetune.storage.workspace import Workspace
    from finetune.tracking.tracker import Choice


def tracking_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What follows the runs that a command makes, and the name under which they are gathered there; see `take_trackers`."""
    for decorate in (
        click.option("--no-mlflow", is_flag=True, help="Do not track the run in MLflow."),
        click.option(
            "--tracker",
            "trackers",
            multiple=True,
            metavar="NAME[=PLACE]",
            help="mlflow (the default), mlflow=URI, tensorboard, tensorboard=FOLDER, none; repeatable.",
        ),
        click.option("--experiment", metavar="NAME", help="Where trackers gather the run (default: the data's name)."),
    ):
        command = decorate(command)
    return command


@dataclass(frozen=True)
class Trackers:
    """What was asked for."""

    choices: tuple[Choice, ...]
    experiment: str | None

    def follow(self, workspace: Workspace, dataset: str) -> AbstractContextManager[Callable[[RunDir], None]]:
        """Follow the runs that begin in a block; see `finetune.tracking.process.followed`."""
        from finetune.tracking.process import followed

        return followed(self.choices, workspace, self.experiment or dataset)


def take_trackers(given: dict[str, Any]) -> Trackers:
    """Take the values of `tracking_options` out of what a command was given.

    Raises:
        InvalidInput: no such tracker.
        MissingExtra: a tracker that was asked for is not installed.
    """
    from finetune.tracking.tracker import choose

    without = ("mlflow",) if given.pop("no_mlflow") else ()
    return Trackers(tuple(choose(given.pop("trackers") or None, without)), given.pop("experiment"))
