"""The state of the training loop, the weights that it may keep, and its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from finetune.runtime.seconds import Seconds
from finetune.tasks import Task
from finetune.tasks.task import ImageResults
from finetune.training.choices import Choices
from finetune.training.machine import Numerics


@dataclass(frozen=True)
class Fitted:
    """The result of training. The classifier that was trained has the chosen weights and is in eval mode."""

    chosen: str  # which weights were kept, in words
    best: Mapping[str, float]  # their val/loss and the headline metric on val, such as val/top1
    best_step: int
    n_steps: int  # that were taken; fewer than the recipe's if training stopped early
    stopped_early: bool
    numerics: Numerics
    choices: Choices
    seconds: Seconds  # of all sessions together, without those of computing features
    frozen_before: str  # sha256 of the parameters and buffers that never train
    frozen_after: str
    resumed_at_step: int | None
    history: tuple[Mapping[str, Any], ...]  # the lines of metrics.jsonl


@dataclass(frozen=True)
class CheckpointSchedule:
    """When checkpoints are written, in addition to the end of each epoch, and which run they belong to."""

    identity: Mapping[str, str]  # digests that identify the run, by name (``spec``, ``dataset``)
    every_seconds: float = 300.0
    every_steps: int | None = None


@dataclass
class LoopState:
    """The state of the training loop. A checkpoint contains it, the weights, the optimiser's state and the moving average."""

    step: int = 0
    evaluated_step: int = -1
    sampled_step: int = -1
    epoch_totals: tuple[float, ...] = (0.0, 0.0, 0.0)  # loss, correct and images, summed over the epoch so far
    epochs_without_gain: int = 0
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = -1
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    start_weights: dict[str, Tensor] = field(default_factory=dict)  # that the fine-tuned weights are interpolated with at the end
    chosen: str = ""
    share: float = 1.0  # see Choices
    recalibrated: bool = False
    stopped_early: bool = False
    finished: bool = False
    frozen_before: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0  # of the sessions before this one
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class CandidateWeights:
    """Weights that may be kept, with their metrics on val and the way they were obtained."""

    name: str
    values: dict[str, float]  # val/loss, the headline metric on val, and the share of images that are predicted correctly
    tensors: dict[str, Tensor]
    share: float = 1.0  # see Choices
    recalibrated: bool = False


def measured(split: str, task: Task, rows: ImageResults) -> dict[str, float]:
    """Return the loss without label smoothing, the headline metric, and the share of images that are predicted correctly."""
    metrics = {metric.key: metric for metric in (task.headline, task.mean_score)}
    return {f"{split}/loss": float(rows.nll.mean()), **{f"{split}/{key}": one.compute(rows) for key, one in metrics.items()}}


def improves(values: Mapping[str, float], best: Mapping[str, float], headline: str) -> bool:
    """Return whether `values` has a higher headline metric than `best`, or the same with a lower loss.

    The metric comes before the loss: a loss that rises while accuracy improves shows overconfidence, which is removed by the
    temperature that is fitted after training (Guo et al. 2017, arXiv:1706.04599).
    """
    key = f"val/{headline}"
    return not best or (values[key], -values["val/loss"]) > (best[key], -best["val/loss"])
