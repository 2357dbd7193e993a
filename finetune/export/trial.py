"""Try a backbone without data: build it, freeze it, take a step, export it, and compare the export with torch.

This is used by the sweep over timm's families (``benchmarks/backbones.py``) and by ``finetune backbones NAME --try``. The weights
are random, so nothing is said about accuracy.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.nn import functional

from finetune.errors import FinetuneError
from finetune.export.dry_run import dry_run_export, noise
from finetune.export.graph import DeployModule, fill
from finetune.model.backbone import build_backbone
from finetune.model.classifier import Classifier
from finetune.model.freeze import apply_freeze, frozen_digest, parameter_groups
from finetune.model.selection import FreezePlan
from finetune.model.tried import Trial
from finetune.runtime.memory import memory_errors_named
from finetune.runtime.session import INPUT_NAME, open_session

NO_MEMORY = "stopped, because it takes more memory than the trial may use"

_N_CLASSES = 5
_BATCH = 2
_ROUNDS = 5


def try_backbone(name: str) -> Trial:
    """Return whether a backbone can be frozen, trained and exported, and the CPU time of one image."""
    torch.manual_seed(0)
    known: dict[str, Any] = {}
    try:
        with memory_errors_named(NO_MEMORY):
            backbone = build_backbone(name, weights="none")
            classifier = Classifier(backbone, _N_CLASSES)
            known = {
                "n_stages": len(backbone.stages),
                "cam_kind": classifier.cam_kind,
                "input_size_px": backbone.preprocess.input_size_px[0],
                "n_parameters": backbone.n_parameters,
            }
            if reason := _train_last_stage(classifier):
                return Trial(name, works=False, reason=reason, **known)
            module = DeployModule(classifier.eval())
            model = fill(dry_run_export(classifier), module)
            milliseconds = _milliseconds(model, backbone.preprocess.input_size_px)
    except FinetuneError as error:
        return Trial(name, works=False, reason=error.message, **known)
    return Trial(name, works=True, **known, milliseconds=milliseconds)


def _train_last_stage(classifier: Classifier) -> str:
    """Take one step with all but the last stage frozen; return what is wrong with the result, or an empty string."""
    last = classifier.backbone.stages[-1].index
    apply_freeze(classifier, FreezePlan(frozenset({last})))
    before = frozen_digest(classifier)
    parameters = [parameter for group in parameter_groups(classifier) for parameter in group.parameters.values()]
    copies = [parameter.detach().clone() for parameter in parameters]
    optimiser = torch.optim.SGD(parameters, lr=0.01)
    classifier.train()
    height, width = classifier.backbone.preprocess.input_size_px
    images = 2 * torch.rand((_BATCH, 3, height, width), generator=torch.Generator().manual_seed(1)) - 1
    functional.cross_entropy(classifier(images), torch.arange(_BATCH)).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    classifier.zero_grad(set_to_none=True)
    if frozen_digest(classifier) != before:
        return "what is frozen changed while the last stage trained"
    if all(torch.equal(copy, parameter) for copy, parameter in zip(copies, parameters, strict=True)):
        return "a training step changed nothing"
    return ""


def _milliseconds(model: bytes, size_px: tuple[int, int]) -> float:
    session, image = open_session(model), noise(1, size_px)
    session.run(None, {INPUT_NAME: image})
    rounds = []
    for _ in range(_ROUNDS):
        began = time.process_time()
        session.run(None, {INPUT_NAME: image})
        rounds.append(1000 * (time.process_time() - began))
    return statistics.median(rounds)
