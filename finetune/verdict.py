"""How good a trained model is, on images that it was not trained on: what the pipeline reports, exports and compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.crossval import OutOfFold
from finetune.data.dataset import Sample
from finetune.evaluate import labels_of, score
from finetune.evaluation.folds import POOLED, CrossValidation
from finetune.evaluation.metrics import Evaluation, Temperature, evaluate_logits, fit_temperature
from finetune.plan import Plan
from finetune.runtime.session import open_session
from finetune.train.methods import Context, Trained, solved_logits

_MIN_IMAGES_TO_CALIBRATE = 100


@dataclass(frozen=True)
class Verdict:
    """How good the trained model is, on each split that it did not train on; `logits` as the exported graph computes them."""

    evaluations: Mapping[str, Evaluation]
    temperature: Temperature | None
    logits: Mapping[str, np.ndarray]  # split -> (N, C) float32
    samples: Mapping[str, tuple[Sample, ...]]
    folds: CrossValidation | None = None  # their answers are the split cv

    def with_folds(self, found: OutOfFold) -> Verdict:
        """This one, with the folds' answers as the split ``cv``, on which the temperature is fitted again: they are more."""
        evaluations = {POOLED: found.result.pooled, **self.evaluations}
        temperature = _calibrate(found.logits, labels_of(found.samples))
        return Verdict(
            evaluations, temperature, {POOLED: found.logits, **self.logits}, {POOLED: found.samples, **self.samples}, found.result
        )

    def with_test_of(self, later: Verdict) -> Verdict:
        """This one, with what `later` adds from splits that this one did not judge."""
        return Verdict(
            {**self.evaluations, **later.evaluations},
            self.temperature,
            {**self.logits, **later.logits},
            {**self.samples, **later.samples},
        )

    @property
    def metrics(self) -> dict[str, float]:
        figures = {key: value for split, found in self.evaluations.items() for key, value in found.metrics(split).items()}
        return {**figures, **(self.folds.metrics if self.folds else {})}


def judge(plan: Plan, trained: Trained, context: Context, splits: Sequence[str] = ("val", "test")) -> Verdict:
    """Evaluate what will be exported, as ONNX Runtime computes it; fit the temperature on val."""
    samples = {split: plan.dataset.of(split) for split in splits if plan.dataset.of(split)}
    score_split = _scorer(plan, trained, context)
    logits = {split: score_split(split, chosen) for split, chosen in samples.items()}
    labels = {split: labels_of(chosen) for split, chosen in samples.items()}
    evaluations = {split: evaluate_logits(logits[split], labels[split], plan.dataset.classes) for split in samples}
    temperature = _calibrate(logits["val"], labels["val"]) if "val" in samples else None
    return Verdict(evaluations, temperature, logits, samples)


def _scorer(plan: Plan, trained: Trained, context: Context) -> Callable[[str, tuple[Sample, ...]], np.ndarray]:
    """What gives the logits of a split. Where only the head is new, the images need not be run through the backbone again."""
    if (
        trained.fitted is None and plan.compute.device == "cpu"
    ):  # a GPU's features are rounded otherwise than the exported graph's
        return lambda split, samples: solved_logits(plan.classifier, samples, context)
    session = open_session(plan.exported(), threads=plan.compute.threads)

    def run(images: np.ndarray) -> np.ndarray:
        """(B, h, w, 3) uint8 -> (B, C) float32"""
        logits: np.ndarray = session.run(["logits"], {"images": images})[0]
        return logits

    return lambda split, samples: score(run, samples, plan.backbone.preprocess, what=split, progress=context.progress)


def _calibrate(logits: np.ndarray, labels: np.ndarray) -> Temperature | None:
    """The temperature of val; None where too few images speak for one, or where they speak for none that makes sense."""
    if len(labels) < _MIN_IMAGES_TO_CALIBRATE:
        return None
    temperature = fit_temperature(logits, labels)
    return None if temperature.at_limit else temperature
