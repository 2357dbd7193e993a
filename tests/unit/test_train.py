"""A recipe carried out: what the network is shown while it trains, and what while it is judged."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_training import tiny_classifier, tiny_recipe, write_images

from finetune.data.augment import build_augment
from finetune.data.dataset import Dataset
from finetune.data.split import split_dataset
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store
from finetune.tasks import task_named
from finetune.training.compute import Compute
from finetune.training.context import TrainingContext
from finetune.training.train import train


@pytest.mark.usefixtures("one_torch_thread")
def test_steps_are_taken_on_small_images_and_judged_on_large_ones(tmp_path: Path) -> None:
    samples = tuple(replace(sample, split=None) for sample in write_images(tmp_path / "images", 24))
    dataset = split_dataset(
        Dataset("pictures", str(tmp_path / "images"), ("a", "b", "c"), samples), val_fraction=0.25, test_fraction=0.0
    )
    classifier = tiny_classifier()  # with an input of 64 pixels
    recipe = tiny_recipe(
        classifier,
        len(dataset.of("train")),
        method={"type": "full", "warm_head": False},
        hyperparameters={"n_epochs": 1, "batch_size": 6, "train_size_px": 48},
    )
    seen: Counter[tuple[bool, int]] = Counter()
    classifier.backbone.register_forward_pre_hook(lambda module, inputs: seen.update([(module.training, inputs[0].shape[-1])]))
    augment = build_augment("default", None, classifier.backbone.preprocess)
    run = RunDir(tmp_path / "run").create()
    context = TrainingContext(
        dataset,
        task_named("multiclass"),
        augment,
        run,
        Compute("cpu", "float32", 1),
        identity={},
        store=Store(tmp_path / "cache"),
    )
    train(classifier, recipe, context)
    assert seen[True, 48] == recipe.n_steps > 0
    assert seen[False, 64] > 0
    assert set(seen) == {(True, 48), (False, 64)}
