"""The run folder: where one execution of a job writes everything it produces. A file that exists there is complete."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import Conflict
from finetune.events import Event
from finetune.storage.files import delete_temporary, file_lock, is_locked, read_json
from finetune.storage.journal import append_line


class RunBusy(Conflict):
    """Another process is working on the run."""

    code, exit_code = "run_busy", os.EX_TEMPFAIL


@dataclass(frozen=True)
class RunDir:
    """Paths inside one run folder, and its two journals (JSON Lines, append-only, each line carries ``at`` in Unix seconds)."""

    root: Path

    @property
    def spec(self) -> Path:
        return self.root / "spec.yaml"

    @property
    def resolved(self) -> Path:
        return self.root / "resolved.json"

    @property
    def split(self) -> Path:
        return self.root / "split.csv"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def predictions(self) -> Path:
        """The folder of the tables of predictions, one ``<split>.npz`` each."""
        return self.root / "predictions"

    def predictions_of(self, split: str) -> Path:
        return self.predictions / f"{split}.npz"

    @property
    def measurements(self) -> Path:
        """The folder of the measurements that a run makes for its diagnosis only."""
        return self.root / "measurements"

    def train_sample_at(self, step: int) -> Path:
        """Return the path of the predictions for a fixed sample of training images after this step."""
        return self.measurements / f"train-step-{step:08d}.npz"

    @property
    def neighbours(self) -> Path:
        """The table of the nearest training image of each held-out image."""
        return self.measurements / "neighbours.csv"

    @property
    def label_doubts(self) -> Path:
        """The table of the labels that are probably wrong."""
        return self.measurements / "label_doubts.csv"

    @property
    def near_copies(self) -> Path:
        """The held-out images that are near duplicates of training images."""
        return self.measurements / "near_copies.json"

    @property
    def preprocessing(self) -> Path:
        """How well the frozen features separate the classes with other normalisations of pixels."""
        return self.measurements / "preprocessing.json"

    @property
    def examination(self) -> Path:
        """The result of an examination of data, in the folder of an examination job."""
        return self.root / "examination.json"

    @property
    def diagnosis(self) -> Path:
        return self.root / "diagnosis.json"

    @property
    def study(self) -> Path:
        return self.root / "study.json"

    @property
    def request(self) -> Path:
        """The request of a comparison."""
        return self.root / "request.json"

    @property
    def comparison(self) -> Path:
        """The result of a comparison. If the file exists, the comparison is complete."""
        return self.root / "comparison.json"

    @property
    def name(self) -> str:
        return self.root.name

    def child(self, name: str) -> RunDir:
        """Return the run folder of a child of this study."""
        return RunDir(self.root / "runs" / name)

    @property
    def parent(self) -> RunDir | None:
        """The study that this run is a child of, or None."""
        above = self.root.parent.parent
        return RunDir(above) if self.root.parent.name == "runs" and RunDir(above).study.exists() else None

    @property
    def outermost(self) -> RunDir:
        """The outermost study that this run belongs to, or this run."""
        parent = self.parent
        return self if parent is None else parent.outermost

    @property
    def options(self) -> Path:
        return self.root / "options.json"

    @property
    def tracking(self) -> Path:
        """The folder in which each tracker's follower records what it has sent (see `finetune.tracking`)."""
        return self.root / "tracking"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def bundle(self) -> Path:
        return self.root / "bundle"

    @property
    def outcome(self) -> Path:
        return self.root / "outcome.json"

    @property
    def progress(self) -> Path:
        return self.root / "progress.json"

    @property
    def cost(self) -> Path:
        return self.root / "cost.json"

    @property
    def error(self) -> Path:
        return self.root / "error.json"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    def create(self) -> RunDir:
        """Create the folder if it does not exist; return self."""
        self.root.mkdir(parents=True, exist_ok=True)
        return self

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the exclusive lock on this run while the block runs; the kernel releases it when this process dies.

        Raises:
            RunBusy: another process holds it.
        """
        with file_lock(self.create().lock, wait=False) as had:
            if not had:
                raise RunBusy(f"{self.root}: another process is working on this run; wait for it, or give another --run-dir")
            delete_temporary(self.root)
            yield

    def is_held(self) -> bool:
        """Return whether a process is working on this run now."""
        return is_locked(self.lock)

    def record(self, event: Event) -> None:
        """Append one line to ``events.jsonl``."""
        append_line(self.events, {"at": time.time(), **event.to_record()})

    def metric(self, step: int, values: Mapping[str, float], *, epoch: float | None = None) -> None:
        """Append one line of metrics (keys are ``split/name``) to ``metrics.jsonl``; `step` counts optimiser steps."""
        append_line(self.metrics, {"at": time.time(), "step": step, "epoch": epoch, "values": dict(values)})


def kept_run(run: RunDir) -> RunDir:
    """Return the run whose weights a run or study keeps: a run itself, or the kept child of a study, through nested studies.

    A study that has not decided yet is returned itself.
    """
    kept = read_json(run.study)["kept"] if run.study.exists() else None
    return run if kept is None else kept_run(run.child(kept))
