"""Resolve a request's training into a recipe: phases, counted in optimiser steps, and hyperparameters without any ``auto``.

All functions are pure: the recipe follows from the request, from facts about data, backbone and machine, and from the backbone's
stages. For each resolved value the recipe records the reason, in words. `finetune.training.fit` carries a recipe out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

from finetune.data.order import steps_per_epoch
from finetune.errors import Problem, SpecError
from finetune.model.selection import HEAD, FreezePlan, StageLike, plan_freeze
from finetune.spec import Full, Gradual, Hyperparameters, JobSpec, LinearProbe, Method, Partial

T = TypeVar("T")
Decay = Literal["cosine", "linear", "none"]
BatchNormPolicy = Literal["frozen", "train", "recalibrate"]
Stepped = Partial | Full | Gradual  # the methods that take optimiser steps

GIVEN = "given"
REFERENCE_BATCH = 32  # images; the default learning rates are for this batch and scale with its square root (AdamW)
CLIP_NORM = 1.0
SMALLER_IMAGES = 0.8  # size of training images, relative to the input size
SMALLEST_IMAGE_PX = 128


@dataclass(frozen=True)
class Facts:
    """The facts that ``auto`` is resolved from; equal facts give equal recipes."""

    n_train: int
    n_val: int
    n_classes: int
    n_parameters: int
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    has_batch_norm: bool = True
    input_size_px: tuple[int, int] = (224, 224)
    resizable: bool = True  # the backbone takes images of other sizes too
    pretrained: bool = True
    losses: tuple[str, ...] = ("cross_entropy",)  # of the task, the default first
    why_unsmoothed: str = ""  # why the task does not smooth labels by default; empty: it does


@dataclass(frozen=True)
class Phase:
    """A span of training with one set of trainable stages and one learning rate schedule. The head always trains."""

    name: str
    solved: bool  # the head is solved on frozen features: no steps
    n_steps: int
    n_epochs: int
    trainable: tuple[int, ...]  # stage indices, ascending
    head_lr: float = 0.0
    stage_lr: Mapping[int, float] = field(default_factory=dict)  # stage index -> peak learning rate
    warmup_fraction: float = 0.0
    decay: Decay = "cosine"

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Phase:
        """Return a phase from its JSON values."""
        rates = {int(index): rate for index, rate in given["stage_lr"].items()}
        return cls(**{**given, "trainable": tuple(given["trainable"]), "stage_lr": rates})


HEAD_PHASE = Phase(name="head", solved=True, n_steps=0, n_epochs=0, trainable=())


@dataclass(frozen=True)
class Recipe:
    """Everything that determines training, resolved. `sources` says by field path of the spec where a value comes from."""

    method: str
    phases: tuple[Phase, ...]
    seed: int
    batch_size: int
    train_size_px: tuple[int, int]  # (height, width) of the images that steps are taken on
    steps_per_epoch: int
    bn: BatchNormPolicy
    weight_decay: float
    label_smoothing: float
    mixup: float
    dropout: float
    clip_norm: float
    early_stopping_epochs: int | None
    ema_half_life_steps: float | None
    views: int
    l2: float | None  # None: chosen by validation
    sources: Mapping[str, str] = field(default_factory=dict)
    loss: str = "cross_entropy"  # that steps minimise; a solved head always has the task's convex loss

    @property
    def n_steps(self) -> int:
        """The number of optimiser steps of all phases; 0 if the head is only solved."""
        return sum(phase.n_steps for phase in self.phases)

    @property
    def n_epochs(self) -> int:
        return sum(phase.n_epochs for phase in self.phases)

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate of the head in any phase."""
        return max(phase.head_lr for phase in self.phases)

    @property
    def solves_head_first(self) -> bool:
        """Whether the first phase solves the head on frozen features."""
        return self.phases[0].solved

    @property
    def trainable(self) -> tuple[int, ...]:
        """Every stage that trains in some phase, ascending."""
        return tuple(sorted({index for phase in self.phases for index in phase.trainable}))

    def phase_at(self, step: int) -> tuple[Phase, int]:
        """Return the phase that optimiser step `step` (from 0) belongs to, and the number of the step within it (from 0).

        Raises:
            IndexError: the recipe has no such step.
        """
        first = 0
        for phase in self.phases:
            if first <= step < first + phase.n_steps:
                return phase, step - first
            first += phase.n_steps
        raise IndexError(f"step {step} is outside this recipe's {self.n_steps} steps")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Recipe:
        """Return the inverse of `to_dict`, also for values from JSON, in which tuples are lists and keys are strings."""
        return cls(
            **{
                **given,
                "phases": tuple(Phase.from_dict(phase) for phase in given["phases"]),
                "train_size_px": tuple(given["train_size_px"]),
            }
        )


def schedule_factor(step: int, n_steps: int, warmup_fraction: float, decay: Decay) -> float:
    """Return the factor on the peak learning rate at `step` (from 0) of a phase: linear warm-up, then `decay` towards zero."""
    warmup = round(n_steps * warmup_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if decay == "none":
        return 1.0
    done = (step - warmup) / max(n_steps - warmup, 1)
    return 1.0 - done if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def stage_key(index: int) -> str:
    """Return the name of a stage among learning rates and in logs."""
    return f"stage{index}"


def learning_rates(recipe: Recipe, step: int) -> dict[str, float]:
    """Return the learning rates at `step`, of ``head`` and of each stage that trains then (``stage0``, ``stage1`` …)."""
    phase, within = recipe.phase_at(step)
    factor = schedule_factor(within, phase.n_steps, phase.warmup_fraction, phase.decay)
    return {HEAD: phase.head_lr * factor, **{stage_key(index): peak * factor for index, peak in phase.stage_lr.items()}}


def freeze_plan(recipe: Recipe, phase: Phase) -> FreezePlan:
    """Return which stages train in `phase`. It follows from the recipe alone, so a resumed run computes it again."""
    return FreezePlan(frozenset(phase.trainable), bn="train" if recipe.bn == "train" else "frozen")


def widest_plan(recipe: Recipe) -> FreezePlan:
    """Return the plan that trains every stage that trains in some phase."""
    return FreezePlan(frozenset(recipe.trainable))


def resolve_recipe(spec: JobSpec, facts: Facts, stages: Sequence[StageLike]) -> Recipe:
    """Return the recipe of a request. Method ``auto`` has none: it is a study of several methods (`finetune.studies.escalate`).

    Raises:
        SpecError: the backbone does not have a stage that the method names, or cannot take images of the requested size; or the
            task does not have the requested loss.
    """
    if spec.method.type == "auto":
        raise ValueError("method auto has no recipe of its own: it is a study of several methods")
    method, hyper = spec.method, spec.hyperparameters
    batch_size = _batch_size(hyper, facts)
    _refuse_batches_of_one(method, facts, batch_size.value)
    epoch_steps = steps_per_epoch(facts.n_train, batch_size.value)
    chosen: dict[str, _Choice[Any]] = {
        "hyperparameters.batch_size": batch_size,
        "hyperparameters.train_size_px": _train_size(hyper, method, facts),
        "hyperparameters.weight_decay": _pick(hyper.weight_decay, _default_weight_decay(method)),
        "hyperparameters.label_smoothing": _pick(hyper.label_smoothing, _default_label_smoothing(method, facts)),
        "hyperparameters.loss": _loss(hyper, facts),
        "hyperparameters.views": _pick(hyper.views, _default_views(method, facts)),
        "hyperparameters.l2": _pick(hyper.l2, _Choice(None, "chosen by validation")),
        "model.head.dropout": _pick(
            spec.model.head.dropout, _Choice(0.0, "default: none, weight decay and smoothing regularise")
        ),
    }
    phases: tuple[Phase, ...] = (HEAD_PHASE,)
    if isinstance(method, Stepped):
        stepped, choices = _stepped_phases(method, hyper, facts, stages, batch_size.value, epoch_steps)
        phases = (HEAD_PHASE, *stepped) if method.warm_head else stepped
        chosen |= choices
    n_steps, n_epochs = sum(phase.n_steps for phase in phases), sum(phase.n_epochs for phase in phases)
    chosen["hyperparameters.early_stopping_epochs"] = _pick(hyper.early_stopping_epochs, _default_patience(n_epochs))
    chosen["hyperparameters.ema"] = _pick(hyper.ema, _default_ema(n_steps))
    return Recipe(
        method=method.type,
        phases=phases,
        seed=spec.seed,
        batch_size=batch_size.value,
        train_size_px=chosen["hyperparameters.train_size_px"].value,
        steps_per_epoch=epoch_steps,
        bn=method.bn if isinstance(method, Stepped) else "frozen",
        weight_decay=chosen["hyperparameters.weight_decay"].value,
        label_smoothing=chosen["hyperparameters.label_smoothing"].value,
        mixup=hyper.mixup,
        dropout=chosen["model.head.dropout"].value,
        clip_norm=CLIP_NORM,
        early_stopping_epochs=chosen["hyperparameters.early_stopping_epochs"].value,
        ema_half_life_steps=max(1.0, 0.05 * n_steps) if chosen["hyperparameters.ema"].value and n_steps else None,
        loss=chosen["hyperparameters.loss"].value,
        views=chosen["hyperparameters.views"].value,
        l2=chosen["hyperparameters.l2"].value,
        sources={path: choice.reason for path, choice in chosen.items()},
    )


def refit_recipe(recipe: Recipe, n_train: int, l2: float | None) -> Recipe:
    """Return `recipe` for a refit on train and val together, `n_train` images, with the same number of epochs.

    An epoch of more images has more steps; every value that is counted in steps is scaled accordingly.

    Args:
        l2: L2 penalty of the head, as chosen by the earlier run.
    """
    epoch_steps = steps_per_epoch(n_train, recipe.batch_size)
    phases = tuple(replace(phase, n_steps=phase.n_epochs * epoch_steps) for phase in recipe.phases)
    half_life = recipe.ema_half_life_steps
    if half_life is not None:
        half_life *= epoch_steps / recipe.steps_per_epoch
    return replace(recipe, phases=phases, steps_per_epoch=epoch_steps, ema_half_life_steps=half_life, l2=l2)


def unfreeze_schedule(n_stages: int, n_epochs: int, epochs_per_stage: int | None = None) -> list[tuple[tuple[int, ...], int]]:
    """Return for each phase of gradual unfreezing, from the top, the stages that train and the number of epochs.

    If there are fewer epochs than stages, several stages are unfrozen at once. The last phase trains every stage and has the
    remaining epochs.
    """
    n_phases = min(n_stages, max(1, n_epochs // (epochs_per_stage or 1)))
    each = epochs_per_stage or n_epochs // n_phases
    lowest = [n_stages - math.ceil(n_stages * phase / n_phases) for phase in range(1, n_phases + 1)]
    epochs = [each] * (n_phases - 1) + [n_epochs - each * (n_phases - 1)]
    return [(tuple(range(first, n_stages)), count) for first, count in zip(lowest, epochs, strict=True)]


def default_layer_decay(n_stages: int) -> float:
    """Return the ratio of a stage's learning rate to that of the stage above it, by the number of stages.

    It is 0.6 for the default backbone's 8 stages. For other numbers of stages the ratio between top and bottom stage is the same,
    as far as the factor stays between 0.5 and 0.85.
    """
    ratio: float = 0.6 ** (7 / max(n_stages - 1, 1))
    return round(min(max(ratio, 0.5), 0.85), 2)


@dataclass(frozen=True)
class _Choice(Generic[T]):
    """A resolved value, and the reason for it in words."""

    value: T
    reason: str


def _pick(given: Any, default: _Choice[Any]) -> _Choice[Any]:
    return default if given == "auto" else _Choice(given, GIVEN)


def _stepped_phases(
    method: Stepped, hyper: Hyperparameters, facts: Facts, stages: Sequence[StageLike], batch_size: int, epoch_steps: int
) -> tuple[tuple[Phase, ...], dict[str, _Choice[Any]]]:
    """Return the phases that take steps, and the resolved values that they depend on, by field path of the spec."""
    n_epochs = _pick(hyper.n_epochs, _default_epochs(method, facts, epoch_steps, len(stages)))
    multiplier = _pick(hyper.learning_rate_multiplier, _Choice(1.0, "default: 1"))
    lr = _pick(hyper.learning_rate, _default_learning_rate(facts, batch_size))
    warmup = _pick(hyper.warmup_fraction, _Choice(0.1, "default: the first tenth of each phase"))
    asked_decay = "auto" if isinstance(method, Partial) else method.layer_decay
    layer_decay = _pick(asked_decay, _default_layer_decay(facts, len(stages)))
    peak = lr.value * multiplier.value
    spans = _spans(method, n_epochs.value, stages)
    phases = tuple(
        Phase(
            name=method.type if len(spans) == 1 else f"{method.type}_{position}",
            solved=False,
            n_steps=epochs * epoch_steps,
            n_epochs=epochs,
            trainable=trainable,
            head_lr=peak if method.warm_head else 3 * peak,
            stage_lr={index: peak * layer_decay.value**rank for rank, index in enumerate(reversed(trainable))},
            warmup_fraction=warmup.value,
            decay="cosine" if position == len(spans) else "none",
        )
        for position, (trainable, epochs) in enumerate(spans, start=1)
    )
    return phases, {
        "hyperparameters.n_epochs": n_epochs,
        "hyperparameters.learning_rate_multiplier": multiplier,
        "hyperparameters.learning_rate": lr,
        "hyperparameters.warmup_fraction": warmup,
        **({} if isinstance(method, Partial) else {"method.layer_decay": layer_decay}),
    }


def _spans(method: Stepped, n_epochs: int, stages: Sequence[StageLike]) -> list[tuple[tuple[int, ...], int]]:
    if isinstance(method, Gradual):
        each = method.epochs_per_stage
        return unfreeze_schedule(len(stages), n_epochs, None if each == "auto" else each)
    return [(tuple(sorted(plan_freeze(stages, method).trainable)), n_epochs)]


def _batch_size(hyper: Hyperparameters, facts: Facts) -> _Choice[int]:
    default = 32 if facts.n_train >= 256 else 16 if facts.n_train >= 64 else 8
    if facts.device == "cuda" and facts.n_train >= 2000:
        default = 64
    asked: _Choice[int] = _pick(hyper.batch_size, _Choice(default, f"default for {facts.n_train} images on {facts.device}"))
    if asked.value > facts.n_train:
        return _Choice(facts.n_train, f"{asked.reason}, lowered from {asked.value} to the number of training images")
    return asked


def _refuse_batches_of_one(method: Method, facts: Facts, batch_size: int) -> None:
    """Refuse batches of one image if batch normalisation would have to train on them.

    Raises:
        SpecError: the batch size is 1, and the method trains batch normalisation.
    """
    if batch_size == 1 and facts.has_batch_norm and isinstance(method, Stepped) and method.bn != "frozen":
        raise SpecError(
            f"hyperparameters.batch_size: 1 is given with method.bn: {method.bn}, and batch normalisation cannot estimate the "
            "variance of a single image; give a batch_size of at least 2, or method.bn: frozen"
        )


def _train_size(hyper: Hyperparameters, method: Method, facts: Facts) -> _Choice[tuple[int, int]]:
    """Return the size of the images that steps are taken on.

    A random crop shows objects larger than evaluation does; a somewhat smaller training image shows them at about the same size
    (Touvron et al. 2019, "Fixing the train-test resolution discrepancy"), and a step then costs little more than half.

    Raises:
        SpecError: a size is given that the backbone or the method cannot use.
    """
    height, width = facts.input_size_px
    free = isinstance(method, Full | Gradual) and facts.resizable
    if hyper.train_size_px == "auto":
        short = round(SMALLER_IMAGES * min(height, width) / 16) * 16
        if not free or not facts.pretrained or short < SMALLEST_IMAGE_PX:
            return _Choice(facts.input_size_px, "the input size")
        return _Choice(
            _scaled(facts.input_size_px, short), f"default: {SMALLER_IMAGES:g} of the input size, as random crops enlarge"
        )
    size_px = _scaled(facts.input_size_px, hyper.train_size_px)
    if size_px == facts.input_size_px or free:
        return _Choice(size_px, GIVEN)
    why = (
        "this backbone takes images of one size only" if not facts.resizable else f"method {method.type} trains on what is cached"
    )
    raise SpecError(
        f"hyperparameters.train_size_px: {hyper.train_size_px} is given and the input size is {height}×{width}, but {why}; "
        "leave it at auto"
    )


def _scaled(size_px: tuple[int, int], short_side_px: int) -> tuple[int, int]:
    """Return the size (height, width) with the same aspect ratio and this shorter side."""
    height, width = (round(side * short_side_px / min(size_px)) for side in size_px)
    return height, width


def _default_epochs(method: Stepped, facts: Facts, epoch_steps: int, n_stages: int) -> _Choice[int]:
    if isinstance(method, Gradual) and method.epochs_per_stage != "auto":
        return _Choice(method.epochs_per_stage * n_stages, "method.epochs_per_stage times the number of stages")
    target_steps, most = (800, 30) if facts.device == "cpu" else (2000, 50)
    n_epochs = min(max(round(target_steps / epoch_steps), 4), most)
    return _Choice(n_epochs, f"default on {facts.device}: about {target_steps} steps, in 4 to {most} epochs")


def _default_learning_rate(facts: Facts, batch_size: int) -> _Choice[float]:
    if not facts.pretrained:
        base, kind = 1e-3, "an untrained backbone"
    elif facts.has_batch_norm:
        base, kind = 3e-4, "a backbone with batch normalisation"
    else:
        base, kind = 1e-4, "a backbone without batch normalisation"
    why = f"default with AdamW for {kind}: {base:g} at batch {REFERENCE_BATCH}, times the square root of the batch's ratio to it"
    return _Choice(base * math.sqrt(batch_size / REFERENCE_BATCH), why)


def _default_layer_decay(facts: Facts, n_stages: int) -> _Choice[float]:
    if not facts.pretrained:
        return _Choice(1.0, "default for an untrained backbone: every stage has as much to learn")
    return _Choice(default_layer_decay(n_stages), f"default for {n_stages} stages: lower ones are more general and move less")


def _default_weight_decay(method: Method) -> _Choice[float]:
    return _Choice(
        0.02 if isinstance(method, Partial) else 0.05, f"default for {method.type} with AdamW; biases and norms have none"
    )


def _loss(hyper: Hyperparameters, facts: Facts) -> _Choice[str]:
    if hyper.loss == "auto":
        return _Choice(facts.losses[0], "default of the task")
    if hyper.loss not in facts.losses:
        raise SpecError(
            "the loss does not fit the task",
            [Problem("hyperparameters.loss", f"{hyper.loss} is not a loss of this task; it has {', '.join(facts.losses)}")],
        )
    return _Choice(hyper.loss, GIVEN)


def _default_label_smoothing(method: Method, facts: Facts) -> _Choice[float]:
    if isinstance(method, LinearProbe):
        return _Choice(0.0, "none: the head is solved with L2")
    if facts.why_unsmoothed:
        return _Choice(0.0, facts.why_unsmoothed)
    if facts.n_train < 1000 or facts.n_classes < 5:
        return _Choice(0.0, "none below 1,000 images or 5 classes")
    return _Choice(0.05 if isinstance(method, Partial) else 0.1, f"default for {method.type} from 1,000 images and 5 classes up")


def _default_patience(n_epochs: int) -> _Choice[int | None]:
    if n_epochs <= 8:
        return _Choice(None, "none: the schedule is short and the best epoch is kept anyway")
    return _Choice(max(3, n_epochs // 3), "default: a third of the epochs")


def _default_ema(n_steps: int) -> _Choice[bool]:
    if n_steps < 100:
        return _Choice(False, "off: under 100 steps there is little to average")
    return _Choice(True, "default from 100 steps up: half-life 5 % of the steps")


def _default_views(method: Method, facts: Facts) -> _Choice[int]:
    if isinstance(method, Full | Gradual):
        return _Choice(1, f"default for {method.type}: the solved head is only where training begins")
    if isinstance(method, Partial):
        return _Choice(4 if facts.n_train < 5000 else 2, f"default for {facts.n_train} training images")
    if facts.n_train < 500:
        return _Choice(4, "default below 500 training images")
    return _Choice(1, "default from 500 training images up: more views cost a pass each and gained nothing when measured")
