"""Predict how long training takes on this machine from the number of images alone, before the images are there. Torch-free.

`Speeds` are measured once for each backbone and machine (`finetune.runs.speeds`, which needs torch). From them and the number of
images, `forecast` adds up the cost of the steps of a run's recipe. Unlike `finetune.runs.estimate` it reads no data, so a server
can return it while a user is still choosing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetune.model.facts import StageFacts
from finetune.model.selection import plan_freeze
from finetune.runtime.device import Device
from finetune.spec import AutoMethod, Full, JobSpec, LinearProbe, Method, Partial
from finetune.training.recipe import Facts, Recipe, resolve_recipe

TYPICAL_IMAGE_BYTES = 500_000
UNCERTAINTY = 1.4  # factor between the computed time and the limits of the forecast
EVERY_RUN = 2.8  # time to read, evaluate, export, check and register, relative to `Speeds.start_seconds`
FIRST_TRACE = 1.2  # time to trace a network for export, the first time with a number of classes, relative to the same
BESIDE_FEATURES = 1.5  # factor on computing features, for hashing, splitting, evaluating and drawing the report
BESIDE_STEPS = 1.3  # factor on forward and backward pass, for the optimiser, the moving average and batches
TOGETHER = 0.9  # n threads are n to this power times as fast as one
MEASURED_STEPS = 18  # that a long run takes to choose precision, memory layout and threads
MEASURED_IMAGES = 16
WORTH_MEASURING_STEPS = 200
FORWARD_SHARE = 1 / 3  # cost of a forward pass without training, relative to a step


@dataclass(frozen=True)
class Speeds:
    """The measured speed of one backbone on one machine. Seconds per image are those of one core, or of the GPU."""

    backbone: str
    stages: tuple[StageFacts, ...]
    n_parameters: int
    has_batch_norm: bool
    resizable: bool
    input_size_px: tuple[int, int]
    device: Device
    threads: int
    start_seconds: float  # to import the libraries and build the network
    decode_seconds: float  # of a small file
    decode_seconds_per_megabyte: float  # in addition, for a larger file
    feature_seconds: float  # of the whole frozen backbone
    prefix_shares: Mapping[int, float]  # first trainable stage -> share of `feature_seconds` for the stages before it
    step_seconds: Mapping[int, float]  # first trainable stage -> forward and backward pass from it on, at the input size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Speeds:
        """Return the inverse of `to_dict`, also for values from JSON, in which keys are strings."""
        return cls(
            **{
                **given,
                "stages": tuple(
                    StageFacts(**{**stage, "output_shape": tuple(stage["output_shape"])}) for stage in given["stages"]
                ),
                "input_size_px": tuple(given["input_size_px"]),
                "prefix_shares": {int(stage): share for stage, share in given["prefix_shares"].items()},
                "step_seconds": {int(stage): seconds for stage, seconds in given["step_seconds"].items()},
            }
        )

    @property
    def cores(self) -> float:
        """The factor by which all threads together are faster than one."""
        return float(self.threads**TOGETHER)

    def step(self, first_trainable: int) -> float:
        """Return the seconds of a step for one image if the stages from `first_trainable` on train."""
        return _between(self.step_seconds, first_trainable) / (self.cores if self.device == "cpu" else 1.0)

    def prefix_share(self, first_trainable: int) -> float:
        """Return the share of the backbone's forward pass that the stages before `first_trainable` take."""
        return _between(self.prefix_shares, first_trainable)


@dataclass(frozen=True)
class Forecast:
    """The predicted duration of a run in seconds, if nothing else runs on the machine."""

    low: float  # about the shortest
    about: float
    high: float  # about the longest

    def __add__(self, other: Forecast) -> Forecast:
        return Forecast(self.low + other.low, self.about + other.about, self.high + other.high)


@dataclass(frozen=True)
class Images:
    """The facts about a dataset that are known before it is read."""

    n: int  # number of images
    n_classes: int
    mean_bytes: float | None = None  # of a file; None: that of a typical photograph


def stages_of(method: Method, speeds: Speeds) -> tuple[Sequence[int], Sequence[int]]:
    """Return the stages that a method always trains, and those that method auto trains only if that improves the model.

    Raises:
        SpecError: the method names a stage that the backbone does not have, or more stages than it has.
    """
    if isinstance(method, AutoMethod):
        return (), tuple(stage.index for stage in speeds.stages)
    return tuple(sorted(plan_freeze(speeds.stages, method).trainable)), ()


def forecast(spec: JobSpec, speeds: Speeds, images: Images) -> Forecast:
    """Return the predicted duration of a job, from its start to the registered model.

    Raises:
        SpecError: the request does not fit the backbone.
    """
    return _with_fixed_costs(_of_study(spec, speeds, images), speeds)


def _of_study(spec: JobSpec, speeds: Speeds, images: Images) -> Forecast:
    rounds = (1 + (spec.data.folds or 0)) * (2 if spec.refits else 1)
    if not isinstance(spec.method, AutoMethod):
        return _of_run(spec, speeds, images, rounds)
    ways: list[Method] = [LinearProbe(), *([Partial(stages=1)] if len(speeds.stages) > 1 else []), Full()]
    parts = [_of_run(spec.model_copy(update={"method": way}), speeds, images, rounds) for way in ways]
    least = sum(part.low for part in parts[:2])  # method auto stops after the second method if that brings no gain
    most = sum(part.high for part in parts)
    return Forecast(least, math.sqrt(least * most), most)


def _of_run(spec: JobSpec, speeds: Speeds, images: Images, rounds: int) -> Forecast:
    """Return the predicted duration of one method, without the work that every job does once."""
    held_out = spec.data.val_fraction + spec.data.held_out_fraction
    n_train = max(1, round(images.n * (1 - held_out)))
    n_val = round(images.n * spec.data.val_fraction)
    recipe = resolve_recipe(spec, _facts(speeds, n_train, n_val, images.n_classes), speeds.stages)
    megabytes = (images.mean_bytes or TYPICAL_IMAGE_BYTES) / 1e6
    decode = (speeds.decode_seconds + megabytes * speeds.decode_seconds_per_megabyte) / speeds.cores
    feature = speeds.feature_seconds / (speeds.cores if speeds.device == "cpu" else 1.0)
    augmented = n_train * (recipe.views - 1)
    once = BESIDE_FEATURES * (images.n + augmented) * (decode + feature)
    if not recipe.n_steps:
        return Forecast(once, once, once)
    first = recipe.trainable[0] if recipe.trainable else len(speeds.stages)
    if first > 0:  # the activations before it are computed once, for every view
        once += (n_train + augmented + n_val) * (decode + feature * speeds.prefix_share(first))
    step = speeds.step(first) * _area(recipe, speeds)
    of_epoch = BESIDE_STEPS * n_train * step + n_val * speeds.step(first) * FORWARD_SHARE
    if first == 0:
        of_epoch = max(of_epoch, n_train * decode)  # images are decoded and augmented in parallel to the steps
    if recipe.n_steps >= WORTH_MEASURING_STEPS:
        once += MEASURED_STEPS * min(recipe.batch_size, MEASURED_IMAGES) * speeds.step(0) * _area(recipe, speeds)
    patience = recipe.early_stopping_epochs
    shortest = recipe.n_epochs if patience is None else min(recipe.n_epochs, patience + 1)
    few, many = once + rounds * shortest * of_epoch, once + rounds * recipe.n_epochs * of_epoch
    return Forecast(few, math.sqrt(few * many), many)


def _with_fixed_costs(computing: Forecast, speeds: Speeds) -> Forecast:
    """Add the work that does not depend on the images, and widen the limits by `UNCERTAINTY`."""
    once, trace = EVERY_RUN * speeds.start_seconds, FIRST_TRACE * speeds.start_seconds
    return Forecast(
        low=(computing.low + once) / UNCERTAINTY,
        about=computing.about + once,
        high=(computing.high + once) * UNCERTAINTY + trace,
    )


def _facts(speeds: Speeds, n_train: int, n_val: int, n_classes: int) -> Facts:
    """Return the facts that a recipe is resolved from."""
    return Facts(
        n_train=n_train,
        n_val=n_val,
        n_classes=n_classes,
        n_parameters=speeds.n_parameters,
        device=speeds.device,
        threads=speeds.threads,
        has_batch_norm=speeds.has_batch_norm,
        input_size_px=speeds.input_size_px,
        resizable=speeds.resizable,
    )


def _area(recipe: Recipe, speeds: Speeds) -> float:
    """Return the area of training images relative to that of the input."""
    return math.prod(recipe.train_size_px) / math.prod(speeds.input_size_px)


def _between(measured: Mapping[int, float], at: int) -> float:
    """Return the value at a stage, interpolated linearly between the nearest measured stages."""
    below = max((stage for stage in measured if stage <= at), default=min(measured))
    above = min((stage for stage in measured if stage >= at), default=max(measured))
    if above == below:
        return measured[below]
    share = (at - below) / (above - below)
    return measured[below] + share * (measured[above] - measured[below])
