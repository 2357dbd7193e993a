"""The TensorBoard tracker: event files with curves, final figures, a table of hyperparameters, and the description as text.

They are written into the run's own folder or into a folder that several runs share; ``tensorboard --logdir`` works on either, and
on the workspace's ``runs``. Event files cannot hold files and models, which stay in the run folder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from finetune.storage.workspace import Workspace
from finetune.tracking.tracker import Place, Point
from finetune.tracking.view import RunView

FINAL = "final"  # the section of final figures; the curve of a metric has its plain name
COST = "cost"


def open_tracker(destination: str | None, workspace: Workspace) -> TensorBoard:
    """Return a tracker that writes event files into the folder `destination`, or into each run's own folder."""
    return TensorBoard(None if destination is None else Path(destination).absolute())


@dataclass
class _Log:
    """The event file of one run in this process."""

    writer: EventFileWriter
    description: str = ""


class TensorBoard:
    """Writes event files. The id of a run is the path of its folder of event files."""

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._suffixes: dict[str, str] = {}  # run id -> what its files' names end in
        self._logs: dict[str, _Log] = {}

    @property
    def destination(self) -> str:
        return str(self._root or "the run folder")

    def begin(self, run: RunView, place: Place) -> tuple[str, bool]:
        if place.parent is not None:
            folder = Path(place.parent) / place.folder.name
        elif self._root is not None:
            folder = self._root / place.folder.name
        else:
            folder = place.folder / "tracking" / "tensorboard"
        self._suffixes[str(folder)] = f".{place.key[:8]}"
        own = list(folder.glob(f"events.*.{place.key[:8]}"))
        if place.known is None:  # files of a process that died before it recorded the run; their content is unknown
            for file in own:
                file.unlink()
        return str(folder), place.known is None or not own

    def facts(self, run_id: str, run: RunView, description: str) -> None:
        log = self._log(run_id)
        if description != log.description:
            text = make_tensor_proto(description)
            metadata = create_summary_metadata(display_name="description", description="")
            value = Summary.Value(tag="description/text_summary", metadata=metadata, tensor=text)
            self._write(run_id, Summary(value=[value]), run.started_at, 0)
            log.description = description
        if run.ended_at is not None and run.params:
            # TensorBoard's table of hyperparameters can be written only once, so it is written when all are known.
            columns, metrics = [HParam(name) for name in run.params], [Metric(tag) for tag, _ in _final(run)]
            self._write(run_id, hparams_config_pb(columns, metrics), run.ended_at, 0)
            self._write(run_id, hparams_pb(dict(run.params), trial_id=run_id, start_time_secs=run.started_at), run.ended_at, 0)

    def points(self, run_id: str, points: Sequence[Point]) -> None:
        for point in points:
            value = Summary.Value(tag=point.key, simple_value=point.value)
            self._write(run_id, Summary(value=[value]), point.at, point.step)

    def figures(self, run_id: str, run: RunView, model_id: str | None) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _final(run)]
        self._write(run_id, Summary(value=values), run.ended_at or run.started_at, 0)

    def file(self, run_id: str, file: Path, name: str) -> None:
        """Do nothing: event files cannot hold files."""

    def model(self, run_id: str, run: RunView) -> str | None:
        return None

    def sample(self, run_id: str, run: RunView) -> None:
        """Do nothing: system metrics are not written to event files."""

    def flush(self) -> None:
        for log in self._logs.values():
            log.writer.flush()

    def _log(self, run_id: str) -> _Log:
        if run_id not in self._logs:
            os.makedirs(run_id, exist_ok=True)
            _wait_for_a_later_name(Path(run_id))
            self._logs[run_id] = _Log(EventFileWriter(run_id, filename_suffix=self._suffixes[run_id]))
        return self._logs[run_id]

    def _write(self, run_id: str, summary: Any, at: float, step: int) -> None:
        self._log(run_id).writer.add_event(Event(wall_time=at, step=step, summary=summary))


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait, for a second at most, until a new event file comes after those in `folder`.

    TensorBoard reads them in the order of their names, which begin with the second in which they were made.
    """
    made = [int(file.name.split(".")[3]) for file in folder.glob("events.out.tfevents.*")]
    while made and max(made) == int(time.time()):
        time.sleep(0.05)


def _final(run: RunView) -> Iterable[tuple[str, float]]:
    """Return the tags and values of a run's final figures and costs."""
    return [
        *((f"{FINAL}/{key}", value) for key, value in run.figures.items()),
        *((f"{COST}/{key}", value) for key, value in run.costs.items()),
    ]
