"""Which stages train, and what holds the others still.

Frozen means four things: no gradient, no optimiser state and no weight decay (frozen parameters are in no parameter group), and
no drift: frozen modules, their batch norms and dropouts, stay in eval mode whatever a parent calls. `frozen_digest` is the proof.
A plan is a pure function of stages and method; which plan holds at which step is the recipe's business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from finetune.errors import Problem, SpecError, did_you_mean
from finetune.model.stages import Stage
from finetune.spec import AutoMethod, LinearProbe, Method, Partial

if TYPE_CHECKING:
    from finetune.model.classifier import Classifier

_HEAD = "head"


@dataclass(frozen=True)
class FreezePlan:
    """`trainable`: indices of the stages that train; the head always does.

    `bn`: in stages that train, batch norms keep their running statistics (``frozen``; weight and bias train) or go on estimating
    them (``train``).
    """

    trainable: frozenset[int]
    bn: Literal["frozen", "train"] = "frozen"


@dataclass(frozen=True)
class ParameterGroup:
    """The trainable parameters of one stage, by name; `stage` is None for the head."""

    stage: int | None
    name: str
    parameters: dict[str, nn.Parameter]


@dataclass(frozen=True)
class Choice:
    """What one method would train of a backbone: a row of ``finetune backbones NAME``."""

    method: str
    trains: tuple[str, ...]
    n_parameters: int
    fraction: float


def plan_freeze(stages: Sequence[Stage], method: Method) -> FreezePlan:
    """The stages that `method` trains at its widest: gradual ends with all of them, auto begins with none.

    Raises:
        SpecError: it names or counts stages that the backbone does not have.
    """
    if isinstance(method, LinearProbe | AutoMethod):
        return FreezePlan(frozenset())
    bn: Literal["frozen", "train"] = "train" if method.bn == "train" else "frozen"
    if not isinstance(method, Partial):
        return FreezePlan(frozenset(stage.index for stage in stages), bn)
    chosen = _named(stages, method.train) if method.train is not None else _from_top(stages, method.stages or 1)
    return FreezePlan(frozenset(chosen), bn)


def apply_freeze(classifier: Classifier, plan: FreezePlan) -> None:
    """Make `plan` hold from now on, through every later `.train()`; changes no weight."""
    stage_of = classifier.backbone.layout.tensor_stage
    for name, parameter in classifier.backbone.module.named_parameters():
        trains = stage_of[name] in plan.trainable
        parameter.requires_grad_(trains)
        if not trains:
            parameter.grad = None
    classifier.plan = plan
    classifier.train(classifier.training)


def hold_frozen(classifier: Classifier) -> None:
    """Put back into eval mode what the classifier's plan freezes. A container trains only if everything inside it does."""
    plan, stages_of = classifier.plan, classifier.backbone.layout.module_stages
    for name, module in classifier.backbone.module.named_modules():
        is_frozen = not stages_of[name] <= plan.trainable
        if is_frozen or (plan.bn == "frozen" and _estimates_statistics(module)):
            module.training = False
    classifier.backbone.training = classifier.backbone.module.training


def parameter_groups(classifier: Classifier) -> tuple[ParameterGroup, ...]:
    """What an optimiser gets: trainable parameters only, one group a stage from the stem up, then what is new (the head)."""
    of_stage: dict[int, dict[str, nn.Parameter]] = {stage.index: {} for stage in classifier.backbone.stages}
    of_head: dict[str, nn.Parameter] = {}
    stage_of = classifier.backbone.layout.tensor_stage
    prefix = "backbone.module."
    for name, parameter in classifier.named_parameters():
        if parameter.requires_grad:
            group = of_stage[stage_of[name.removeprefix(prefix)]] if name.startswith(prefix) else of_head
            group[name] = parameter
    groups = (ParameterGroup(stage.index, stage.name, of_stage[stage.index]) for stage in classifier.backbone.stages)
    return (*(group for group in groups if group.parameters), ParameterGroup(None, _HEAD, of_head))


def frozen_digest(classifier: Classifier) -> str:
    """sha256 over the names, types, shapes and bytes of all parameters and buffers of the stages that are frozen now."""
    stage_of, trainable = classifier.backbone.layout.tensor_stage, classifier.plan.trainable
    module = classifier.backbone.module
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        if stage_of[name] not in trainable:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def describe(stages: Sequence[Stage]) -> tuple[Choice, ...]:
    """What each method would train of these stages, from least to most, without the head."""
    total = sum(stage.n_parameters for stage in stages)

    def choice(method: str, n_stages: int) -> Choice:
        chosen = stages[len(stages) - n_stages :]
        count = sum(stage.n_parameters for stage in chosen)
        return Choice(method, tuple(stage.name for stage in chosen), count, count / total if total else 0.0)

    partial = [choice(f"partial {{stages: {n}}}", n) for n in range(1, len(stages))]
    return (choice("linear_probe", 0), *partial, choice("full", len(stages)))


def _from_top(stages: Sequence[Stage], count: int) -> list[int]:
    if count > len(stages):
        names = ", ".join(stage.name for stage in stages)
        message = f"must be at most {len(stages)}, given {count}; the backbone's stages are {names}"
        raise SpecError("the method does not fit the backbone", [Problem("method.stages", message)])
    return [stage.index for stage in stages[len(stages) - count :]]


def _named(stages: Sequence[Stage], wanted: Sequence[str]) -> list[int]:
    index_of = {stage.name: stage.index for stage in stages}
    allowed = [*index_of, _HEAD]  # the head trains anyway; naming it is no mistake
    problems = [
        Problem(
            f"method.train[{position}]", f"no stage {name!r}; the stages are {', '.join(index_of)}.{did_you_mean(name, allowed)}"
        )
        for position, name in enumerate(wanted)
        if name not in allowed
    ]
    if problems:
        raise SpecError("the method does not fit the backbone", problems)
    return [index_of[name] for name in wanted if name in index_of]


def _estimates_statistics(module: nn.Module) -> bool:
    """Any kind of batch norm: it is the running variance that tells, not the class."""
    return isinstance(getattr(module, "running_var", None), Tensor)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
