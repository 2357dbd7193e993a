"""Build the optimiser: AdamW with parameter groups that never change, and learning rates that depend only on the step.

A group contains the parameters of one stage, or of the head, that have weight decay, or those that have none. The groups of
stages that are unfrozen later exist from the start: a frozen parameter has no gradient, so AdamW neither updates nor decays it
and keeps no state for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from finetune.model.classifier import Classifier
from finetune.model.freeze import ParameterGroup, apply_freeze, parameter_groups
from finetune.model.selection import HEAD
from finetune.training.recipe import Recipe, learning_rates, stage_key, widest_plan


def group_key(group: ParameterGroup) -> str:
    """Return the key of a group in learning rates and logged metrics: ``stage0``, ``stage1`` …, ``head``."""
    return HEAD if group.stage is None else stage_key(group.stage)


def build_optimizer(classifier: Classifier, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW over the head and every stage that trains in some phase. Applies `widest_plan` to the classifier."""
    apply_freeze(classifier, widest_plan(recipe))
    exempt = _exempt_by_architecture(classifier.backbone.module)
    groups: list[dict[str, Any]] = []
    for group in parameter_groups(classifier):
        for weight_decay, decayed in ((recipe.weight_decay, True), (0.0, False)):
            members = [p for name, p in group.parameters.items() if (p.ndim > 1 and name not in exempt) == decayed]
            if members:
                groups.append({"params": members, "key": group_key(group), "weight_decay": weight_decay})
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> Mapping[str, float]:
    """Set each group's learning rate for `step` (0 if its stage is frozen then), and return the rates by group key."""
    rates = learning_rates(recipe, step)
    for group in optimizer.param_groups:
        group["lr"] = rates.get(group["key"], 0.0)
    return rates


def _exempt_by_architecture(module: nn.Module) -> set[str]:
    """Return the names of matrices that timm exempts from weight decay for this architecture, such as position embeddings."""
    listed = getattr(module, "no_weight_decay", None)
    return {f"backbone.module.{name}" for name in listed()} if callable(listed) else set()
