"""The protocol of a tracker, to which runs are mirrored, and the table of available trackers.

`finetune.tracking.mirror` is responsible for the order of calls and for their failures: every method may raise any exception and
may be slow.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from finetune.distribution import install_command
from finetune.errors import InvalidInput, MissingExtra, did_you_mean
from finetune.storage.workspace import Workspace

if TYPE_CHECKING:
    from finetune.tracking.view import RunView


@dataclass(frozen=True)
class Kind:
    """One kind of tracker.

    Args:
        module: defines ``open_tracker(destination, workspace) -> Tracker``.
        package: the import name of the client library that it needs.
        extra: the extra of our distribution that installs this library.
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
    """A tracker that was requested.

    Args:
        destination: where it stores runs: a URI for MLflow, a folder for TensorBoard; None for its default.
    """

    kind: str
    destination: str | None = None

    def __str__(self) -> str:
        return self.kind if self.destination is None else f"{self.kind}={self.destination}"


@dataclass(frozen=True)
class Point:
    """One value in the history of a metric."""

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
        key: unique for each run, and unchanged when the run is resumed.
        parent: the tracker's id of the study that the run is part of.
        known: the tracker's id of the run, if it was mirrored before.
    """

    experiment: str
    folder: Path
    key: str
    parent: str | None = None
    known: str | None = None


class Tracker(Protocol):
    """A connection to one tracker. All methods are idempotent: sending the same data again changes nothing."""

    @property
    def destination(self) -> str:
        """Where the tracker stores runs, for display: without a password."""
        ...

    def begin(self, run: RunView, place: Place) -> tuple[str, bool]:
        """Find the run by its known id or its key, or create it; return its id and whether it is new."""
        ...

    def facts(self, run_id: str, run: RunView, description: str) -> None:
        """Set name, status, params, tags, datasets and the Markdown description. Called again when any of it has changed."""
        ...

    def points(self, run_id: str, points: Sequence[Point]) -> None:
        """Append values to the histories of metrics, in order."""
        ...

    def figures(self, run_id: str, run: RunView, model_id: str | None) -> None:
        """Set the final figures and the costs of the run."""
        ...

    def file(self, run_id: str, file: Path, name: str) -> None:
        """Store a file under `name` (with slashes), replacing an earlier file of that name."""
        ...

    def model(self, run_id: str, run: RunView) -> str | None:
        """Store the run's bundle as a model, registered as in the models folder; return its id, or None if not supported."""
        ...

    def sample(self, run_id: str, run: RunView) -> None:
        """Record system metrics. Called every few seconds while the run is in progress."""
        ...

    def flush(self) -> None:
        """Wait until all data that was sent has been stored."""
        ...


class TrackerModule(Protocol):
    """The interface of a tracker's module."""

    def open_tracker(self, destination: str | None, workspace: Workspace) -> Tracker:
        """Connect to the tracker at `destination`; None for its default."""
        ...


def open_tracker(choice: Choice, workspace: Workspace) -> Tracker:
    """Connect to a tracker. Imports its client library, which may take seconds."""
    module: TrackerModule = importlib.import_module(TRACKERS[choice.kind].module)
    return module.open_tracker(choice.destination, workspace)


def is_installed(kind: str) -> bool:
    """Return whether the client library of a kind of tracker is installed, without importing it."""
    return importlib.util.find_spec(TRACKERS[kind].package) is not None


def choose(asked: Sequence[str] | None, without: Sequence[str] = (), environment: Mapping[str, str] = os.environ) -> list[Choice]:
    """Return the requested trackers; by default those in ``FINETUNE_TRACKERS``, else MLflow if it is installed.

    Args:
        asked: each ``mlflow`` or ``tensorboard``, with a destination ``mlflow=URI`` or ``tensorboard=FOLDER``; or ``none``.
        without: kinds that are excluded in any case.

    Raises:
        InvalidInput: no such tracker.
        MissingExtra: a requested tracker is not installed.
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
    """Parse the value of one ``--tracker`` option. Raises InvalidInput for an unknown tracker."""
    kind, _, destination = text.partition("=")
    if kind not in TRACKERS:
        names = list(TRACKERS)
        raise InvalidInput(f"--tracker {text}: trackers are {', '.join([*names, NONE])}.{did_you_mean(kind, names)}")
    return Choice(kind, destination or None)
