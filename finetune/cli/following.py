"""Options of the training commands for experiment trackers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from finetune.spec import JobSpec
    from finetune.storage.rundir import RunDir
    from finetune.storage.workspace import Workspace
    from finetune.tracking.tracker import Choice


def tracking_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for trackers and the experiment's name to a command; see `pop_trackers`."""
    for decorate in (
        click.option("--no-mlflow", is_flag=True, help="Do not track the run in MLflow."),
        click.option(
            "--tracker",
            "trackers",
            multiple=True,
            metavar="NAME[=PLACE]",
            help="mlflow (the default), mlflow=URI, tensorboard, tensorboard=FOLDER or none; repeatable.",
        ),
        click.option(
            "--experiment", metavar="NAME", help="Name of the experiment in the trackers. Default: the name of the data."
        ),
    ):
        command = decorate(command)
    return command


@dataclass(frozen=True)
class Trackers:
    """The requested trackers and the name of the experiment."""

    choices: tuple[Choice, ...]
    experiment: str | None

    def follow(self, workspace: Workspace, of: JobSpec | str) -> AbstractContextManager[Callable[[RunDir], None]]:
        """Mirror the runs that begin in a block to the trackers; see `finetune.tracking.process.followed`.

        Args:
            of: the job or the name of its dataset, after which the experiment is called by default.
        """
        if not self.choices:
            return nullcontext(lambda run: None)
        from finetune.tracking.process import followed
        from finetune.tracking.view import experiment_name

        return followed(self.choices, workspace, self.experiment or (of if isinstance(of, str) else experiment_name(of)))


def pop_trackers(given: dict[str, Any]) -> Trackers:
    """Pop the values of `tracking_options` from a command's arguments.

    Raises:
        InvalidInput: a tracker is unknown.
        MissingExtra: a requested tracker is not installed.
    """
    from finetune.tracking.tracker import choose

    without = ("mlflow",) if given.pop("no_mlflow") else ()
    return Trackers(tuple(choose(given.pop("trackers") or None, without)), given.pop("experiment"))
