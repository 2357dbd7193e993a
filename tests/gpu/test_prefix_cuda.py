"""The prefix engine on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from folders import path_of
from tiny_training import tiny_classifier, write_images

from finetune.features.prefix import embedding_prefix
from finetune.features.rows import FeatureContext, Views, pooled_features
from finetune.storage.store import Store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_features_on_the_gpu_agree_with_the_cpu_s_and_are_found_again(tmp_path: Path) -> None:
    samples = write_images(tmp_path / "images", 12)
    classifier = tiny_classifier().eval()
    views = Views(classifier.backbone.preprocess)
    done: list[int] = []
    on_gpu = FeatureContext(Store(tmp_path / "cache"), "cuda", progress=lambda update: done.append(update.done))
    features = pooled_features(embedding_prefix(classifier), samples, views, on_gpu)
    with torch.no_grad():
        pixels = np.stack([views.preprocess.load_file(path_of(sample)) for sample in samples])
        expected = classifier.embed(classifier.normalise(torch.from_numpy(pixels))).numpy()
    np.testing.assert_allclose(features, expected, rtol=2e-2, atol=1e-3)
    assert done[-1] == 12
    done.clear()
    np.testing.assert_array_equal(pooled_features(embedding_prefix(classifier), samples, views, on_gpu), features)
    assert not done
