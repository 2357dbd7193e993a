"""What happens in a run, as typed events: one line each in ``events.jsonl``, for people (`message`) and programs (the fields).

A consumer that reads a run folder, a job's history or a live stream sees the same names: `kind` is stable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

Level = Literal["info", "warning", "error"]


@dataclass(frozen=True)
class Event:
    """Base of all events; `message` is one sentence for people."""

    kind: ClassVar[str]
    level: ClassVar[Level] = "info"

    message: str

    def to_record(self) -> dict[str, Any]:
        """Return the event as JSON values, as a journal line holds it."""
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
    """Something about the data that keeps nobody from training and that a person should know."""

    kind = "warning"
    level = "warning"


@dataclass(frozen=True)
class HeadSolved(Event):
    """The linear head was computed on frozen features."""

    kind = "head_solved"
    path: Sequence[Mapping[str, float]]  # l2, val_nll, val_score of each strength that was tried
    converged: bool


@dataclass(frozen=True)
class SettingsMeasured(Event):
    """Ways to compute a training step were timed on this machine, and the fastest was chosen."""

    kind = "settings_measured"
    timings: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PrefixPlanned(Event):
    """What of the frozen part is computed once and kept."""

    kind = "prefix"


@dataclass(frozen=True)
class PrefixEngine(Event):
    """The frozen part does not run in the fastest way, and why."""

    kind = "prefix_engine"
    level = "warning"


@dataclass(frozen=True)
class CacheFull(Event):
    """Something was not kept, because the cache or the disk has no room."""

    kind = "cache_full"
    level = "warning"


@dataclass(frozen=True)
class CacheFormat(Event):
    """Activations are kept in a wider number format than usual."""

    kind = "cache_format"


@dataclass(frozen=True)
class CheckpointDamaged(Event):
    """A checkpoint could not be read, and an older one was taken."""

    kind = "checkpoint_damaged"
    level = "warning"


@dataclass(frozen=True)
class TrainingStarted(Event):
    """The first step is about to be taken."""

    kind = "training"
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Resumed(Event):
    """Training goes on from a checkpoint; `exact`: with the bits of a run that was not interrupted."""

    kind = "resumed"
    step: int
    exact: bool


@dataclass(frozen=True)
class Interrupted(Event):
    """The run was asked to stop, and wrote a checkpoint."""

    kind = "interrupted"
    level = "warning"
    step: int


@dataclass(frozen=True)
class Trained(Event):
    """The steps are taken and the best weights chosen."""

    kind = "trained"
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Diagnosed(Event):
    """What the records of the run say about it; the codes of the problems that were found."""

    kind = "diagnosed"
    problems: Sequence[str]


@dataclass(frozen=True)
class ChildFinished(Event):
    """A run of a study has ended."""

    kind = "child_finished"
    child: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Compared(Event):
    """A candidate was compared with the best one so far, image by image."""

    kind = "compared"
    child: str
    gain: float
    standard_error: float


@dataclass(frozen=True)
class StudyConcluded(Event):
    """A study has nothing left to run; which child it keeps."""

    kind = "study_concluded"
    kept: str


@dataclass(frozen=True)
class Quantised(Event):
    """What became of the wish for an int8 model."""

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
    """The data is not what it was when an earlier run of the same request began, so this is a new run."""

    kind = "data_changed"
    level = "warning"


@dataclass(frozen=True)
class TrackingInterrupted(Event):
    """A tracker cannot be reached, or lacks something of a run that has ended."""

    kind = "tracking_interrupted"
    level = "warning"
    tracker: str


@dataclass(frozen=True)
class TrackingRecovered(Event):
    """A tracker that could not be reached has everything again."""

    kind = "tracking_recovered"
    tracker: str
