"""About how long training will take on this machine, told before the pictures have arrived. Torch-free.

`Speeds` are measured once for each backbone and machine (`finetune.runs.speeds`, which needs torch); with them and the number
of images, `forecast` adds up what the recipe of a run asks for. Unlike `finetune.runs.estimate` it reads no data, so a server can
answer with it while somebody chooses.
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
UNCERTAINTY = 1.4  # a run takes between what is computed divided by this and what is computed times this
EVERY_RUN = 2.8  # times the start: to read, evaluate, export, test and register
FIRST_TRACE = 1.2  # times the start: to trace a network for export, the first time with so many classes
BESIDE_FEATURES = 1.5  # of computing them: hashing, splitting, judging, drawing the report
BESIDE_STEPS = 1.3  # of a step's forward and backward pass: optimiser, moving average, batches
TOGETHER = 0.9  # n threads are so fast as n to this power
MEASURED_STEPS = 18  # that a long run spends on choosing how to compute
MEASURED_IMAGES = 16
WORTH_MEASURING_STEPS = 200
FORWARD_SHARE = 1 / 3  # of a step, where nothing is trained


@dataclass(frozen=True)
class Speeds:
    """How fast one machine computes one backbone. Seconds of an image are those of one core, or of the GPU."""

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
    decode_seconds_per_megabyte: float  # of a larger one, on top
    feature_seconds: float  # the whole frozen backbone
    prefix_shares: Mapping[int, float]  # first trainable stage -> the share of `feature_seconds` that lies before it
    step_seconds: Mapping[int, float]  # first trainable stage -> forward and backward pass from there on, at the input size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Speeds:
        """Return the inverse of `to_dict`, also after a trip through JSON, where keys became texts."""
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
        """How many times faster all threads are than one."""
        return float(self.threads**TOGETHER)

    def step(self, first_trainable: int) -> float:
        """Return the seconds of a step for one image where the stages from `first_trainable` on train."""
        return _between(self.step_seconds, first_trainable) / (self.cores if self.device == "cpu" else 1.0)

    def prefix_share(self, first_trainable: int) -> float:
        """Return the share of the frozen backbone that lies before a stage."""
        return _between(self.prefix_shares, first_trainable)


@dataclass(frozen=True)
class Forecast:
    """The seconds that a run takes if nothing else runs on the machine: at least, about, and at most."""

    low: float
    about: float
    high: float

    def __add__(self, other: Forecast) -> Forecast:
        return Forecast(self.low + other.low, self.about + other.about, self.high + other.high)


@dataclass(frozen=True)
class Images:
    """What is known of a dataset before it is read."""

    n: int
    n_classes: int
    mean_bytes: float | None = None  # of a file; None: that of a typical photograph


def stages_of(method: Method, speeds: Speeds) -> tuple[Sequence[int], Sequence[int]]:
    """Return the stages that a method trains, and those that it tries and keeps where that pays.

    Raises:
        SpecError: the method names or counts stages that the backbone does not have.
    """
    if isinstance(method, AutoMethod):
        return (), tuple(stage.index for stage in speeds.stages)
    return tuple(sorted(plan_freeze(speeds.stages, method).trainable)), ()


def forecast(spec: JobSpec, speeds: Speeds, images: Images) -> Forecast:
    """Return about how long a job takes, from its start to the registered model.

    Raises:
        SpecError: the request does not fit the backbone.
    """
    return _with_what_every_run_does(_of_study(spec, speeds, images), speeds)


def _of_study(spec: JobSpec, speeds: Speeds, images: Images) -> Forecast:
    rounds = (1 + (spec.data.folds or 0)) * (2 if spec.refits else 1)
    if not isinstance(spec.method, AutoMethod):
        return _of_run(spec, speeds, images, rounds)
    ways: list[Method] = [LinearProbe(), *([Partial(stages=1)] if len(speeds.stages) > 1 else []), Full()]
    parts = [_of_run(spec.model_copy(update={"method": way}), speeds, images, rounds) for way in ways]
    least = sum(part.low for part in parts[:2])  # it goes no deeper where the second way does not pay
    most = sum(part.high for part in parts)
    return Forecast(least, math.sqrt(least * most), most)


def _of_run(spec: JobSpec, speeds: Speeds, images: Images, rounds: int) -> Forecast:
    """Return the seconds of one method, without what every job does once."""
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
    if first > 0:  # what lies before is computed once, for every view
        once += (n_train + augmented + n_val) * (decode + feature * speeds.prefix_share(first))
    step = speeds.step(first) * _area(recipe, speeds)
    of_epoch = BESIDE_STEPS * n_train * step + n_val * speeds.step(first) * FORWARD_SHARE
    if first == 0:
        of_epoch = max(of_epoch, n_train * decode)  # images are decoded and varied beside the steps
    if recipe.n_steps >= WORTH_MEASURING_STEPS:
        once += MEASURED_STEPS * min(recipe.batch_size, MEASURED_IMAGES) * speeds.step(0) * _area(recipe, speeds)
    patience = recipe.early_stopping_epochs
    shortest = recipe.n_epochs if patience is None else min(recipe.n_epochs, patience + 1)
    few, many = once + rounds * shortest * of_epoch, once + rounds * recipe.n_epochs * of_epoch
    return Forecast(few, math.sqrt(few * many), many)


def _with_what_every_run_does(computing: Forecast, speeds: Speeds) -> Forecast:
    """Add what does not depend on the images, and what is not known of a machine."""
    once, trace = EVERY_RUN * speeds.start_seconds, FIRST_TRACE * speeds.start_seconds
    return Forecast(
        low=(computing.low + once) / UNCERTAINTY,
        about=computing.about + once,
        high=(computing.high + once) * UNCERTAINTY + trace,
    )


def _facts(speeds: Speeds, n_train: int, n_val: int, n_classes: int) -> Facts:
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
    """Return how much smaller than the input the images of steps are, by area."""
    return math.prod(recipe.train_size_px) / math.prod(speeds.input_size_px)


def _between(measured: Mapping[int, float], at: int) -> float:
    """Return the value at a stage on the line through the measured ones beside it."""
    below = max((stage for stage in measured if stage <= at), default=min(measured))
    above = min((stage for stage in measured if stage >= at), default=max(measured))
    if above == below:
        return measured[below]
    share = (at - below) / (above - below)
    return measured[below] + share * (measured[above] - measured[below])
