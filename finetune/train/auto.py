"""Method ``auto``: begin with the solved head, train deeper only while that pays, keep the best so far.

Each candidate starts from the pretrained weights and is judged on the same validation images, so two of them are compared image
by image: what counts are the images that only one of them gets right. Going deeper has paid when the gain exceeds its standard
error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from finetune.data.loader import EvalLoader
from finetune.model.classifier import Classifier
from finetune.storage.files import write_atomic
from finetune.storage.rundir import RunDir
from finetune.train.average import StateDict, copy_state
from finetune.train.machine import computing_with, prepare_images, to_device
from finetune.train.methods import Context, Trained, solved_logits, train_classifier
from finetune.train.recipe import Recipe


@dataclass(frozen=True)
class Gain:
    """What one candidate gets right beyond another, as shares of the same images."""

    gain: float
    standard_error: float

    @property
    def pays(self) -> bool:
        return self.gain > self.standard_error

    def __str__(self) -> str:
        return f"{100 * self.gain:+.1f} ± {100 * self.standard_error:.1f} points of val top1"


def paired_gain(correct: np.ndarray, than: np.ndarray) -> Gain:
    """Compare two (N,) bool arrays over the same images. The standard error is that of the mean of their differences."""
    n, won, lost = len(correct), int((correct & ~than).sum()), int((than & ~correct).sum())
    gain = (won - lost) / n
    return Gain(gain, math.sqrt(max(won + lost - n * gain**2, 1.0)) / n)  # at least as if one image had differed


def train_until_it_stops_paying(classifier: Classifier, recipes: Sequence[Recipe], context: Context) -> Trained:
    """Carry out `recipes` from the cheapest up, as `train_classifier` does each; the classifier ends with the best one's weights.

    A candidate's checkpoints and journal are in ``candidates/<method>`` of the run folder; the best one's journal is the run's.
    """
    run = context.run
    start = copy_state(classifier)
    best: _Candidate | None = None
    reasons: list[str] = []
    seconds = 0.0
    for recipe in recipes:
        classifier.load_state_dict(start)
        folder = RunDir(run.root / "candidates" / recipe.method).create()
        identity = {**context.identity, "candidate": recipe.method}
        trained = train_classifier(classifier, recipe, replace(context, run=folder, identity=identity))
        seconds += trained.seconds
        candidate = _Candidate(trained, folder, copy_state(classifier), _correct(classifier, trained, context))
        gain = None if best is None else paired_gain(candidate.correct, best.correct)
        if gain is not None:
            reasons.append(f"{recipe.method} gained {gain}")
            run.event("candidate", f"{reasons[-1]}", method=recipe.method, gain=gain.gain, standard_error=gain.standard_error)
        if gain is None or gain.gain > 0:
            best = candidate
        if gain is not None and not gain.pays:
            reasons[-1] += ", so it goes no deeper"
            break
    assert best is not None
    classifier.load_state_dict(best.state)
    write_atomic(run.metrics, lambda stream: stream.write(best.folder.metrics.read_bytes()))
    summary = f"auto: {best.trained.summary} ({'; '.join(reasons)})"
    run.event("chosen", summary)
    return replace(best.trained, summary=summary, seconds=seconds)


@dataclass(frozen=True)
class _Candidate:
    trained: Trained
    folder: RunDir
    state: StateDict
    correct: np.ndarray  # (N,) bool, over the validation images


@torch.no_grad()
def _correct(classifier: Classifier, trained: Trained, context: Context) -> np.ndarray:
    val, compute = context.dataset.of("val"), context.compute
    if trained.fitted is None:  # its features are in the cache
        logits = solved_logits(classifier, val, context)
        right: np.ndarray = logits.argmax(axis=1) == np.array([sample.target for sample in val])
        return right
    settings = compute.plain_settings()
    classifier.eval()
    parts = []
    with computing_with(settings):
        for batch in EvalLoader(val, classifier.backbone.preprocess, threads=compute.threads):
            images = prepare_images(classifier, to_device(batch.images, settings), settings)
            parts.append(classifier(images).argmax(dim=1).cpu().numpy() == batch.labels)
    return np.concatenate(parts)
