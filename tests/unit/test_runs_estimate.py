"""What `finetune check` says a recipe will take."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune.train.estimate import estimate
from finetune.train.methods import Compute
from tiny_training import tiny_classifier, tiny_recipe, write_images

from finetune.data.augment import build_augment
from finetune.data.dataset import Dataset
from finetune.storage.store import Store

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_twice_the_epochs_take_longer_and_a_probe_keeps_only_pooled_features(tmp_path: Path) -> None:
    dataset = Dataset("pictures", str(tmp_path), ("a", "b", "c"), tuple(write_images(tmp_path / "images", 12)))
    classifier = tiny_classifier()
    augment = build_augment("light", None, classifier.backbone.preprocess)
    compute = Compute("cpu", "float32", 1)

    def of(**given: object):
        return estimate(classifier, [tiny_recipe(classifier, 12, **given)], dataset, augment, compute, Store(tmp_path / "cache"))

    probe = of(hyperparameters={"views": 1})
    short = of(method={"type": "full", "warm_head": False}, hyperparameters={"n_epochs": 100})
    long = of(method={"type": "full", "warm_head": False}, hyperparameters={"n_epochs": 10_000})
    assert probe.cache_bytes == 12 * (classifier.backbone.num_features * 4 + 32), "float32 rows and their keys"
    assert long.seconds > 10 * short.seconds > 0
    assert short.cache_bytes == 0
    assert "nothing is computed once" in short.prefix
    assert long.memory_bytes > 0
