"""What a tracker is: a place that runs are mirrored to, as one protocol; and the trackers that there are.

The order of calls is the mirror's business (`finetune.tracking.mirror`), and so is what happens when one of them fails: every
method may raise anything, and may be slow.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune.distribution import install_command
from finetune.errors import InvalidInput, MissingExtra, did_you_mean
from finetune.storage.workspace import Workspace
from finetune.tracking.view import RunView


@dataclass(frozen=True)
class Kind:
    """One kind of tracker.

    Args:
        module: defines ``open_tracker(destination, workspace) -> Tracker``.
        package: that has to be installed for it.
        extra: of our distribution, that installs it.
    """

    module: str
    package: str
    extra: str


TRACKERS: Mapping[str, Kind] = {
    "mlflow": Kind("finetune.tracking.mlflow.tracker", "mlflow", "train"),
    "tensorboard": Kind("finetune.tracking.tensorboard", "tensorboard", "tensorboard"),
}
DEFAULT, NONE = "mlflow", "none"
VARIABLE = "FINETUNE_TRACKERS"  # trackers, separated by spaces


@dataclass(frozen=True)
class Choice:
    """A tracker that somebody asked for.

    Args:
        destination: where it keeps runs: a URI for MLflow, a folder for TensorBoard; None: where it does by default.
    """

    kind: str
    destination: str | None = None

    def __str__(self) -> str:
        return self.kind if self.destination is None else f"{self.kind}={self.destination}"


@dataclass(frozen=True)
class Point:
    """One value of a metric in the course of a run."""

    key: str  # as in metrics.jsonl: split/name
    value: float  # may be NaN
    at: float  # Unix seconds
    step: int  # of the optimiser
    epoch: float | None


@dataclass(frozen=True)
class Place:
    """Where a run belongs in a tracker.

    Args:
        folder: of the run.
        key: differs from that of any other run, and stays that of this one when it is resumed.
        parent: the tracker's id of the study that it is part of.
        known: the tracker's id of the run, if it has been there before.
    """

    experiment: str
    folder: Path
    key: str
    parent: str | None = None
    known: str | None = None


class Tracker(Protocol):
    """A connection to one tracker. What is sent twice is there once."""

    @property
    def destination(self) -> str:
        """Where it keeps runs, as people may read it: without a password."""
        ...

    def begin(self, run: RunView, place: Place) -> tuple[str, bool]:
        """Find the run by its known id or its key, or create it; return its id, and whether it is new and so has nothing yet."""
        ...

    def facts(self, run_id: str, run: RunView, description: str) -> None:
        """Set name, status, params, tags, datasets and the Markdown description. Called again when any of it has changed."""
        ...

    def points(self, run_id: str, points: Sequence[Point]) -> None:
        """Append to the metrics' course, in order."""
        ...

    def figures(self, run_id: str, run: RunView, model_id: str | None) -> None:
        """Set what the run came to and what it cost."""
        ...

    def file(self, run_id: str, file: Path, name: str) -> None:
        """Store a file under `name` (with slashes), in place of an earlier one of that name."""
        ...

    def model(self, run_id: str, run: RunView) -> str | None:
        """Store the run's bundle as a model, registered as in our registry; return its id. None: the tracker has no models."""
        ...

    def sample(self, run_id: str, run: RunView) -> None:
        """Record what the machine is doing. Called every few seconds while the run goes on."""
        ...

    def flush(self) -> None:
        """Make sure that all that was sent has arrived."""
        ...


class TrackerModule(Protocol):
    """What the module of a tracker defines."""

    def open_tracker(self, destination: str | None, workspace: Workspace) -> Tracker: ...


def open_tracker(choice: Choice, workspace: Workspace) -> Tracker:
    """Connect to a tracker. Imports its client library, which may take seconds."""
    module: TrackerModule = importlib.import_module(TRACKERS[choice.kind].module)
    return module.open_tracker(choice.destination, workspace)


def is_installed(kind: str) -> bool:
    """Return whether what a kind of tracker needs is installed, without importing it."""
    return importlib.util.find_spec(TRACKERS[kind].package) is not None


def choose(asked: Sequence[str] | None, without: Sequence[str] = (), environment: Mapping[str, str] = os.environ) -> list[Choice]:
    """Return the trackers that were asked for; by default those in ``FINETUNE_TRACKERS``, else MLflow if it is installed.

    Args:
        asked: each ``mlflow``, ``tensorboard`` or, with a place to write to, ``tensorboard=FOLDER``, ``mlflow=URI``; or ``none``.
        without: kinds that are left out in any case.

    Raises:
        InvalidInput: no such tracker.
        MissingExtra: a tracker that was asked for is not installed.
    """
    if asked is None and VARIABLE in environment:
        asked = environment[VARIABLE].split()
    if asked is None:
        choices = [Choice(DEFAULT)] if is_installed(DEFAULT) else []
    else:
        choices = [parse_choice(text) for text in asked if text != NONE]
    chosen = {choice.kind: choice for choice in choices if choice.kind not in without}
    for kind, choice in chosen.items():
        if not is_installed(kind):
            raise MissingExtra(f"--tracker {choice} needs {TRACKERS[kind].package}: {install_command(TRACKERS[kind].extra)}")
    return list(chosen.values())


def parse_choice(text: str) -> Choice:
    """Return what one ``--tracker`` option asks for."""
    kind, _, destination = text.partition("=")
    if kind not in TRACKERS:
        names = list(TRACKERS)
        raise InvalidInput(f"--tracker {text}: trackers are {', '.join([*names, NONE])}.{did_you_mean(kind, names)}")
    return Choice(kind, destination or None)
