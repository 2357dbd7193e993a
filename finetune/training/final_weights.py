"""Choose the weights that are kept at the end of training, among those of the best epoch and variations of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from finetune.data.loader import Batch
from finetune.model.classifier import Classifier
from finetune.model.freeze import apply_freeze
from finetune.model.selection import FreezePlan
from finetune.training.average import copy_state, interpolate, loaded_state, recalibrate
from finetune.training.choices import Choices
from finetune.training.evaluator import Evaluator, closed_after
from finetune.training.recipe import Recipe
from finetune.training.state import CandidateWeights

INTERPOLATION_SHARES = (0.25, 0.5, 0.75)  # of the fine-tuned weights, in interpolations with the weights at the start

TrainBatches = Callable[[int, int], Iterable[Batch]]  # (epoch, step within it) -> the batches from there to the epoch's end


@dataclass(frozen=True)
class FinalWeights:
    """The weights of the best epoch, and how variations of them are computed and evaluated.

    Args:
        best_epoch: the weights of the best epoch.
        start: the weights at the start of training; empty if they are not interpolated with.
        train: yields training images, with which running statistics are estimated anew.
    """

    classifier: Classifier
    recipe: Recipe
    evaluator: Evaluator
    train: TrainBatches
    best_epoch: CandidateWeights
    start: Mapping[str, Tensor]

    def best_on(self, val: Iterable[Batch]) -> CandidateWeights:
        """Try interpolations with the weights at the start, then recalibrated running statistics; return the best on val."""
        kept = self.best_epoch
        for share in INTERPOLATION_SHARES if self.start else ():
            kept = self._better(kept, self._interpolated(kept, share), val)
        if self.recipe.bn == "recalibrate":
            kept = self._better(kept, self._with_recalibrated_statistics(kept), val)
        return kept

    def as_in(self, choices: Choices) -> CandidateWeights:
        """Return the variation that an earlier run chose."""
        kept = self.best_epoch
        if choices.share < 1.0:
            kept = self._interpolated(kept, choices.share)
        return self._with_recalibrated_statistics(kept) if choices.recalibrated else kept

    def _better(self, kept: CandidateWeights, other: CandidateWeights, val: Iterable[Batch]) -> CandidateWeights:
        with loaded_state(self.classifier, other.tensors):
            values = self.evaluator.evaluate(val)
        return replace(other, values=values) if self.evaluator.improves(values, kept.values) else kept

    def _interpolated(self, kept: CandidateWeights, share: float) -> CandidateWeights:
        """Return the interpolation of the best epoch's weights, with weight `share`, and the weights at the start."""
        name = f"{self.best_epoch.name}, interpolated by {1 - share:.0%} towards the start"
        return replace(kept, name=name, tensors=interpolate(self.start, self.best_epoch.tensors, share), share=share)

    def _with_recalibrated_statistics(self, kept: CandidateWeights) -> CandidateWeights:
        """Return weights with the running statistics of trained stages estimated anew on one more epoch of training images."""
        with loaded_state(self.classifier, kept.tensors), closed_after(self.train(self.recipe.n_epochs, 0)) as batches:
            self.classifier.train()
            apply_freeze(self.classifier, FreezePlan(frozenset(self.recipe.trainable), bn="train"))
            recalibrate(self.classifier, (self.evaluator.inputs(batch) for batch in batches), self.evaluator.forward)
            tensors = copy_state(self.classifier)
        return replace(kept, name=f"{kept.name}, running statistics recalibrated", tensors=tensors, recalibrated=True)
