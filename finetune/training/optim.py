"""The optimiser: AdamW with parameter groups fixed when training begins, and learning rates that only the step decides.

A group holds the decayed or the undecayed parameters of one stage, or of the head. Groups of stages that thaw later exist from
the start: while frozen they have no gradient, so AdamW neither moves nor decays them and keeps no state for them.
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
    """Return the key of a group's learning rate, and of what is logged about it: ``stage0``, ``stage1`` …, ``head``."""
    return HEAD if group.stage is None else stage_key(group.stage)


def build_optimizer(classifier: Classifier, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW over the head and every stage that trains in some phase; the classifier is left frozen as in `widest_plan`."""
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
    """Give each group its learning rate at `step`, 0 where the stage is frozen then; returns the rates by group key."""
    rates = learning_rates(recipe, step)
    for group in optimizer.param_groups:
        group["lr"] = rates.get(group["key"], 0.0)
    return rates


def _exempt_by_architecture(module: nn.Module) -> set[str]:
    """Return the names of what the architecture wants undecayed besides vectors: position embeddings and the like."""
    listed = getattr(module, "no_weight_decay", None)
    return {f"backbone.module.{name}" for name in listed()} if callable(listed) else set()
