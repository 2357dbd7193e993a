"""What makes a freeze plan hold: which stages train, and what keeps the others still.

Frozen means four things: no gradient, no optimiser state and no weight decay (frozen parameters are in no parameter group), and
no drift: frozen modules, their batch norms and dropouts, stay in eval mode whatever a parent calls. `frozen_digest` is the proof.
Which stages a method trains is decided in `finetune.model.selection`, which plan holds at which step in the recipe.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from finetune.model.selection import HEAD, FreezePlan

if TYPE_CHECKING:
    from finetune.model.classifier import Classifier


@dataclass(frozen=True)
class ParameterGroup:
    """The trainable parameters of one stage, by name; `stage` is None for the head."""

    stage: int | None
    name: str
    parameters: dict[str, nn.Parameter]


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
    return (*(group for group in groups if group.parameters), ParameterGroup(None, HEAD, of_head))


def frozen_digest(classifier: Classifier, trainable: frozenset[int] | None = None) -> str:
    """Return the sha256 over the names, types, shapes and bytes of all parameters and buffers of the stages that are frozen.

    Args:
        trainable: indices of the stages that are not; by default those of the classifier's present plan.
    """
    stage_of, trains = classifier.backbone.layout.tensor_stage, classifier.plan.trainable if trainable is None else trainable
    module = classifier.backbone.module
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        if stage_of[name] not in trains:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _estimates_statistics(module: nn.Module) -> bool:
    """Any kind of batch norm: it is the running variance that tells, not the class."""
    return isinstance(getattr(module, "running_var", None), Tensor)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
