"""Training on a CUDA device: the same loop, mixed precision where the GPU has it, resumable."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from tiny_training import CLASSES, MULTICLASS, epochs_of, targets_of, tiny_classifier, tiny_recipe, write_images

from finetune.data.loader import EvalLoader
from finetune.storage.rundir import RunDir
from finetune.training.fit import fit
from finetune.training.interrupt import Interrupted
from finetune.training.machine import Numerics, choose_numerics, computes_bfloat16
from finetune.training.state import CheckpointSchedule, Fitted

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def train_on_gpu(folder: Path, numerics: Numerics, *, stop_after: int | None = None) -> Fitted:
    samples = write_images(folder / "images", 26)
    classifier = tiny_classifier()
    recipe = tiny_recipe(
        classifier, 20, method={"type": "full", "warm_head": False}, hyperparameters={"n_epochs": 3, "batch_size": 5}
    )
    batches = epochs_of(samples[:20], classifier, recipe)
    seen = 0

    def counted(epoch, start_step):  # type: ignore[no-untyped-def]
        nonlocal seen
        for batch in batches(epoch, start_step):
            seen += 1
            if seen == stop_after:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    val = EvalLoader(samples[20:], classifier.backbone.preprocess)
    return fit(
        classifier,
        recipe,
        counted,
        val,
        RunDir(folder).create(),
        CheckpointSchedule({}),
        **MULTICLASS,
        train_targets=targets_of(samples[:20]),
        val_targets=targets_of(samples[20:]),
        numerics=lambda: numerics,
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_on_the_gpu_learns_and_resumes(tmp_path: Path, precision: str) -> None:
    if precision == "bfloat16" and not computes_bfloat16("cuda"):
        pytest.skip("this GPU has no bfloat16")
    numerics = Numerics("cuda", precision, channels_last=True, threads=1)  # type: ignore[arg-type]
    with pytest.raises(Interrupted):
        train_on_gpu(tmp_path, numerics, stop_after=5)
    fitted = train_on_gpu(tmp_path, numerics)
    assert fitted.resumed_at_step == 5
    assert fitted.n_steps == 12
    losses = [line["values"]["train/loss"] for line in fitted.history if "train/loss" in line["values"]]
    assert losses[-1] < losses[0]
    assert 0 <= fitted.best["val/top1"] <= 1


def test_numerics_are_measured_on_the_gpu() -> None:
    classifier = tiny_classifier()
    recipe = tiny_recipe(classifier, 400, method="full", hyperparameters={"n_epochs": 30})
    numerics, timings = choose_numerics(classifier, recipe, device="cuda", threads=1)
    assert numerics.device == "cuda"
    assert len(timings) >= 2
    assert classifier.head.out_features == CLASSES
    assert next(classifier.parameters()).device.type == "cpu"
