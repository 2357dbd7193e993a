"""Apply a freeze plan to a classifier, and prove that frozen stages do not change.

Frozen means: no gradient, no optimiser state, no weight decay (frozen parameters are in no parameter group), and no change of
running statistics: frozen modules, with their batch norms and dropouts, stay in eval mode even if `.train()` is called on a
parent. `frozen_digest` before and after training proves it. `finetune.model.selection` decides which stages a method trains, and
the recipe which plan applies at which step.
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
    """Freeze and unfreeze stages as `plan` says; the plan stays in force through later calls of `.train()`."""
    stage_of = classifier.backbone.layout.tensor_stage
    for name, parameter in classifier.backbone.module.named_parameters():
        trains = stage_of[name] in plan.trainable
        parameter.requires_grad_(trains)
        if not trains:
            parameter.grad = None
    classifier.plan = plan
    classifier.train(classifier.training)


def set_frozen_to_eval(classifier: Classifier) -> None:
    """Put the modules that the classifier's plan freezes into eval mode; a container is frozen if anything inside it is."""
    plan, stages_of = classifier.plan, classifier.backbone.layout.module_stages
    for name, module in classifier.backbone.module.named_modules():
        is_frozen = not stages_of[name] <= plan.trainable
        if is_frozen or (plan.bn == "frozen" and _estimates_statistics(module)):
            module.training = False
    classifier.backbone.training = classifier.backbone.module.training


def parameter_groups(classifier: Classifier) -> tuple[ParameterGroup, ...]:
    """Return the trainable parameters, in one group for each stage from the stem up and a last group for the head."""
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
    """Return the sha256 of names, types, shapes and bytes of all parameters and buffers of the frozen stages.

    Args:
        trainable: indices of the stages that are not frozen; by default those of the classifier's plan.
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
    """Return whether a module is some kind of batch norm, which is recognised by its running variance and not by its class."""
    return isinstance(getattr(module, "running_var", None), Tensor)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
