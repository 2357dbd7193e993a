"""The records of one run, read from its folder: the input of every check. Torch-free, so that a server can diagnose too.

A run that is in progress or failed has fewer records; those that are missing are empty or None.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import NotFound
from finetune.evaluation import predictions as tables
from finetune.evaluation.evaluate import POOLED
from finetune.evaluation.predictions import Predictions
from finetune.metrics import Metric
from finetune.storage.files import read_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir, kept_run
from finetune.tasks import Task, task_named

HEAD = "head"
HELD_OUT_SPLITS = (POOLED, "test", "val")  # the more independent split first

Curve = list[tuple[float, float]]  # (epoch or step, value)


@dataclass(frozen=True)
class Neighbour:
    """A held-out image and its nearest training image in feature space."""

    split: str
    id: str
    label: str
    nearest: str
    nearest_label: str
    ratio: float  # of the distances to the nearest and the fifth nearest training image


@dataclass(frozen=True)
class RunRecords:
    """All records of one run."""

    run: RunDir
    resolved: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]  # of metrics.jsonl
    samples: Mapping[int, Predictions]  # predictions for a fixed sample of training images, by step
    held_out: Mapping[str, Predictions]  # predictions of the weights that were kept, by split
    neighbours: Sequence[Neighbour]
    preprocessing: Mapping[str, Any] | None
    outcome: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    copies: frozenset[tuple[str, str]] = frozenset()  # split and id of held-out images that are near duplicates, pixel by pixel
    against: RunRecords | None = field(default=None, repr=False)  # a run to compare with: shallower, or with more frozen stages

    @classmethod
    def read(cls, folder: Path, against: RunRecords | None = None) -> RunRecords:
        """Read the folder of a run or study.

        Of a study, the records are those of the run that it keeps. A cross-validation adds the answers of its folds to the
        images that they held out, as the split `POOLED`, and the nearest training images that the folds found for these.

        Raises:
            NotFound: it is not the folder of a run, or the run has not written its plan yet.
        """
        whole = RunDir(folder.absolute())
        run = kept_run(whole)
        if not run.resolved.exists() and not run.error.exists():
            raise NotFound(
                f"{folder}: not the folder of a run that has begun to train (it has no resolved.json). Give a folder in the "
                "workspace's runs (.finetune/runs, or runs in FINETUNE_HOME), such as the one that finetune train named at its "
                "end"
            )
        of_folds = whole.predictions_of(POOLED)
        held_out = [*sorted(run.predictions.glob("*.npz")), *([of_folds] if whole != run and of_folds.exists() else [])]
        return cls(
            run=whole,
            resolved=_json(run.resolved) or {},
            lines=read_lines(run.metrics),
            samples=_samples(run),
            held_out={path.stem: tables.read(path) for path in held_out},
            neighbours=_neighbours(run.neighbours) + (_neighbours(whole.neighbours) if whole != run else []),
            preprocessing=_json(run.preprocessing),
            outcome=_json(run.outcome),
            error=_json(run.error),
            copies=_copies(run.near_copies) | (_copies(whole.near_copies) if whole != run else frozenset()),
            against=against,
        )

    # the plan -----------------------------------------------------------------------------------------------------

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The training recipe in ``resolved.json``; empty if there is none."""
        found: Mapping[str, Any] = self.resolved.get("recipe", {})
        return found

    @property
    def phases(self) -> Sequence[Mapping[str, Any]]:
        """The phases that take optimiser steps."""
        return [phase for phase in self.recipe.get("phases", []) if phase["n_steps"]]

    @property
    def n_planned_steps(self) -> int:
        return sum(phase["n_steps"] for phase in self.phases)

    @property
    def begins_with_solved_head(self) -> bool:
        """Whether training starts from a head that was solved on frozen features."""
        phases = self.recipe.get("phases", [])
        return bool(phases) and bool(phases[0]["solved"])

    @property
    def is_pretrained(self) -> bool:
        """Whether training started from pretrained weights."""
        weights = self.resolved.get("backbone", {}).get("weights", {})
        return bool(weights) and weights["source"] != "none"

    @property
    def stage_names(self) -> Mapping[str, str]:
        """Map each stage key to the backbone's name for the stage."""
        return {f"stage{stage['index']}": stage["name"] for stage in self.resolved.get("backbone", {}).get("stages", [])}

    @property
    def stage_sizes(self) -> Mapping[str, int]:
        """Map each stage key to the stage's number of parameters."""
        return {f"stage{stage['index']}": stage["n_parameters"] for stage in self.resolved.get("backbone", {}).get("stages", [])}

    @property
    def n_train(self) -> int:
        return int(self.resolved.get("dataset", {}).get("sizes", {}).get("train", 0))

    @property
    def n_classes(self) -> int:
        return len(self.resolved.get("dataset", {}).get("classes", ()))

    def called(self, part: str) -> str:
        """Return a stage's display name: its key, with the backbone's own name for it."""
        name = self.stage_names.get(part)
        return part if name is None else f"{part} ({name})"

    # what happened ------------------------------------------------------------------------------------------------

    def curve(self, key: str, by: str = "epoch") -> Curve:
        """Return the values of a metric by epoch or step; for a step that was repeated after a resume, the last value."""
        points = {
            float(line[by]): math.nan if line["values"][key] is None else float(line["values"][key])
            for line in self.lines
            if key in line["values"] and line.get(by) is not None
        }
        return sorted(points.items())

    def signal(self, kind: str, part: str) -> Curve:
        """Return one measurement of a stage by step; `kind` is grad_norm, weight_norm, update_ratio or dead_channels."""
        return self.curve(f"train/{kind}/{part}", by="step")

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The parts whose gradients were measured: stage keys from the stem up, then the head."""
        found = {
            match[1] for line in self.lines for key in line["values"] if (match := re.fullmatch(r"train/grad_norm/(.+)", key))
        }
        return tuple(sorted(found, key=lambda part: (part == HEAD, int(part.removeprefix("stage")) if part != HEAD else 0)))

    @property
    def n_steps(self) -> int:
        """The number of steps that were taken."""
        return max((int(line["step"]) for line in self.lines), default=0)

    # predictions ------------------------------------------------------------------------------------------------------

    @property
    def task(self) -> Task:
        return task_named(self.resolved.get("task", "multiclass"))

    @property
    def headline(self) -> Metric[Any]:
        return self.task.headline

    @property
    def score(self) -> Metric[Any]:
        """The metric that is the mean over images of `scores`."""
        return self.task.mean_score

    @property
    def scores_are_headline(self) -> bool:
        """Whether the headline metric is the mean of `scores` over images, so that its limits and chance level hold for them."""
        return self.headline is self.score

    @property
    def first_sample(self) -> Predictions | None:
        """The predictions for the training sample before the first step."""
        return self.samples.get(0)

    @property
    def last_sample(self) -> Predictions | None:
        """The latest predictions for the training sample; equal to `first_sample` if no step was taken."""
        return self.samples[max(self.samples)] if self.samples else None

    @property
    def most_independent(self) -> tuple[str, Predictions] | None:
        """The most independent held-out split and the predictions for it."""
        return next(((split, self.held_out[split]) for split in HELD_OUT_SPLITS if split in self.held_out), None)

    @property
    def last_val(self) -> tuple[float, float] | None:
        """Loss and mean score on val of the last evaluation, whether or not those weights were kept."""
        losses, scores = self.curve("val/loss"), self.curve(f"val/{self.score.key}")
        return (losses[-1][1], scores[-1][1]) if losses and scores else None

    def scores(self, table: Predictions) -> NDArray[np.float64]:
        """Return (N,) scores: 1 where an image was predicted correctly, else 0.

        Labels are given from a probability of 1/2, even if the table has thresholds: scores of training and held-out images are
        compared, and the tables of training images have no thresholds.
        """
        return self.task.image_results(table.logits, table.labels).score

    def losses(self, table: Predictions) -> NDArray[np.float64]:
        """Return (N,) losses of the images, in nats."""
        return table.image_results().nll


def _json(path: Path) -> Mapping[str, Any] | None:
    return read_json(path) if path.exists() else None


def _samples(run: RunDir) -> dict[int, Predictions]:
    """Return the tables of the training sample by step, without those whose logits are not finite (a diverged run)."""
    found = {int(path.stem.rpartition("-")[2]): tables.read(path) for path in sorted(run.measurements.glob("train-step-*.npz"))}
    return {step: table for step, table in found.items() if np.isfinite(table.logits).all()}


def _copies(path: Path) -> frozenset[tuple[str, str]]:
    return frozenset((one["split"], one["file"]) for one in (_json(path) or {}).get("copies", ()))


def _neighbours(path: Path) -> list[Neighbour]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as stream:
        return [
            Neighbour(row["split"], row["path"], row["label"], row["nearest"], row["nearest_label"], float(row["ratio"]))
            for row in csv.DictReader(stream)
        ]
