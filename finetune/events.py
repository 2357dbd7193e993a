"""The events of a run as typed values: one line each in ``events.jsonl``, with a message for people and fields for programs.

The names in `kind` are stable, and the same in a run folder, in a job's history and in a live stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

Level = Literal["info", "warning", "error"]


@dataclass(frozen=True)
class Event:
    """The base class of all events; `message` is one sentence for people."""

    kind: ClassVar[str]
    level: ClassVar[Level] = "info"

    message: str

    def to_record(self) -> dict[str, Any]:
        """Return the event as JSON values, as in a line of ``events.jsonl``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"kind": self.kind, "level": self.level, **values}


EventCallback = Callable[[Event], object]  # such as `RunDir.record`


def ignore_event(_: Event) -> None:
    """Drop the event."""


@dataclass(frozen=True)
class Planned(Event):
    """The data is read and split, and every ``auto`` is resolved."""

    kind = "planned"
    counts: Mapping[str, int]  # images by split
    n_quarantined: int


@dataclass(frozen=True)
class DataWarning(Event):
    """A peculiarity of the data that does not prevent training but that the user should know."""

    kind = "warning"
    level = "warning"


@dataclass(frozen=True)
class HeadSolved(Event):
    """The linear head was computed on frozen features."""

    kind = "head_solved"
    path: Sequence[Mapping[str, float]]  # l2, val_nll, val_score of each L2 strength that was tried
    converged: bool


@dataclass(frozen=True)
class SettingsMeasured(Event):
    """Several ways to compute a training step were timed on this machine, and the fastest was chosen."""

    kind = "settings_measured"
    timings: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PrefixPlanned(Event):
    """It was decided which part of the frozen backbone is computed once and cached."""

    kind = "prefix"


@dataclass(frozen=True)
class PrefixEngine(Event):
    """The frozen prefix cannot run with the fastest engine; the message says why."""

    kind = "prefix_engine"
    level = "warning"


@dataclass(frozen=True)
class CacheFull(Event):
    """Something was not cached, because the cache or the disk is full."""

    kind = "cache_full"
    level = "warning"


@dataclass(frozen=True)
class CacheFormat(Event):
    """Activations are cached in a wider number format than usual."""

    kind = "cache_format"


@dataclass(frozen=True)
class CheckpointDamaged(Event):
    """A checkpoint could not be read, and an older one was used."""

    kind = "checkpoint_damaged"
    level = "warning"


@dataclass(frozen=True)
class TrainingStarted(Event):
    """The first step is about to be taken."""

    kind = "training"
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Resumed(Event):
    """Training resumes from a checkpoint; `exact`: bit-equal to an uninterrupted run."""

    kind = "resumed"
    step: int
    exact: bool


@dataclass(frozen=True)
class Interrupted(Event):
    """The run was asked to stop and has written a checkpoint."""

    kind = "interrupted"
    level = "warning"
    step: int


@dataclass(frozen=True)
class Trained(Event):
    """Training has ended and the best weights are chosen."""

    kind = "trained"
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Diagnosed(Event):
    """The run was diagnosed; `problems` are the codes of the problems that were found."""

    kind = "diagnosed"
    problems: Sequence[str]


@dataclass(frozen=True)
class ChildFinished(Event):
    """A child of a study has ended."""

    kind = "child_finished"
    child: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Compared(Event):
    """A child of a study was compared with the best one so far, image by image."""

    kind = "compared"
    child: str
    gain: float
    standard_error: float


@dataclass(frozen=True)
class StudyConcluded(Event):
    """A study has no more children to run; `kept` is the one whose model it keeps."""

    kind = "study_concluded"
    kept: str


@dataclass(frozen=True)
class Quantised(Event):
    """Quantisation to int8 was tried; `kept` says whether the int8 model is exported."""

    kind = "quantised"
    kept: bool


@dataclass(frozen=True)
class Registered(Event):
    """The model is a version in the registry, and the run is complete."""

    kind = "succeeded"
    model: str
    version: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Finished(Event):
    """The run is complete; nothing was registered."""

    kind = "finished"
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Failed(Event):
    """The run ended with an error."""

    kind = "failed"
    level = "error"
    code: str


@dataclass(frozen=True)
class DataChanged(Event):
    """The data has changed since an earlier run of the same request began, so a new run is started."""

    kind = "data_changed"
    level = "warning"


@dataclass(frozen=True)
class TrackingInterrupted(Event):
    """A tracker cannot be reached, or is incomplete after a run has ended."""

    kind = "tracking_interrupted"
    level = "warning"
    tracker: str


@dataclass(frozen=True)
class TrackingRecovered(Event):
    """A tracker can be reached again and is complete."""

    kind = "tracking_recovered"
    tracker: str
