"""Take one optimiser step: forward pass, loss, gradients, clipping, and the update of the weights.

A step is a pure function of recipe, step number, batch and weights: the learning rates, dropout and mixup follow from the number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data.loader import Batch
from finetune.errors import TrainingError
from finetune.model.auxiliary import AUX_LOSS_WEIGHT
from finetune.model.classifier import Classifier
from finetune.model.selection import HEAD
from finetune.training.evaluator import Forward, Prepare, Targets
from finetune.training.machine import Numerics, autocast, to_device
from finetune.training.mixing import mix, partners, step_seed
from finetune.training.optim import set_learning_rates
from finetune.training.recipe import Recipe
from finetune.training.signals import Parameters, StepMeter

SIGNAL_EVERY_STEPS = 20


@dataclass(frozen=True)
class StepResult:
    """What one step computed for its batch of B images."""

    logits: Tensor  # (B, C), detached
    targets: Tensor  # (B,) or (B, C), as the task encodes them
    loss: Tensor  # scalar, detached, without the loss of the auxiliary head
    head_lr: float
    signals: Mapping[str, float]  # norms of gradients, weights and updates (`StepMeter`); empty if this step is not measured


@dataclass
class Stepper:
    """Takes the steps of a recipe on a classifier.

    Args:
        optimizer: has the parameters of every stage that trains in some phase.
        prepare, forward: compute logits from a batch.
    """

    classifier: Classifier
    recipe: Recipe
    targets: Targets
    optimizer: torch.optim.Optimizer
    prepare: Prepare
    forward: Forward
    numerics: Numerics

    def take(self, step: int, batch: Batch, parameters: Parameters) -> StepResult:
        """Take step number `step` on a batch.

        Args:
            parameters: those that train in this step, by key.
        """
        recipe = self.recipe
        seed = step_seed(recipe.seed, step)
        torch.manual_seed(seed)
        rates = set_learning_rates(self.optimizer, recipe, step)
        targets = to_device(self.targets.train[batch.indices], self.numerics)
        inputs = self.prepare(self.classifier, to_device(batch.images, self.numerics), self.numerics)  # (B, 3, h, w) float32
        inputs, other_targets, share = mix(inputs, targets, recipe.mixup, seed)
        with autocast(self.numerics):
            logits, aux_logits = self._logits(inputs)  # each (B, C)
        weights = self._image_weights(batch, seed)
        loss = self.targets.objective.loss(logits, targets, other_targets, share, recipe.label_smoothing, weights)
        objective = loss
        if aux_logits is not None:
            aux_loss = self.targets.objective.loss(aux_logits, targets, other_targets, share, recipe.label_smoothing, weights)
            objective = loss + AUX_LOSS_WEIGHT * aux_loss
        objective.backward()
        signals = self._update_weights(parameters, measured=step % SIGNAL_EVERY_STEPS == 0)
        return StepResult(logits.detach(), targets, loss.detach(), rates[HEAD], signals)

    def _image_weights(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor] | None:
        """Return the weights of the images of a batch, and of those that are blended into them."""
        if self.targets.train_weights is None:
            return None
        own = self.targets.train_weights[batch.indices].astype(np.float32)
        mixup = self.recipe.mixup
        other = own if mixup == 0.0 else own[partners(len(own), mixup, seed)[0]]
        return to_device(own, self.numerics), to_device(other, self.numerics)

    def _logits(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the logits of the head, and those of the auxiliary head if there is one."""
        if self.classifier.aux is not None:
            return self.classifier.forward_with_aux(inputs)
        return self.forward(self.classifier, inputs), None

    def _update_weights(self, parameters: Parameters, *, measured: bool) -> Mapping[str, float]:
        """Apply the clipped gradients, and return the signals if they are to be measured."""
        meter = StepMeter(parameters) if measured else None
        nn.utils.clip_grad_norm_([p for members in parameters.values() for p in members], self.recipe.clip_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {} if meter is None else meter.measure()


def check_finite(loss: float, step: int, n_steps: int, head_lr: float) -> None:
    """Raise `TrainingError`, with advice, if the loss is not finite."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss} at step {step} of {n_steps}, with learning rate {head_lr:.2g}. "
            "Try hyperparameters.learning_rate_multiplier: 0.1, or compute.precision: float32."
        )
