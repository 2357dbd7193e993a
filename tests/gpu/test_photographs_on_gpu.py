"""Features of real photographs, computed on a CUDA device and on the CPU with the default backbone and its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import local_sample

from finetune.features.prefix import embedding_prefix
from finetune.features.rows import FeatureContext, Views, pooled_features
from finetune.model.backbone import build_backbone
from finetune.model.classifier import Classifier
from finetune.storage.store import Store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

N_IMAGES = 64


def test_features_of_photographs_point_the_same_way_on_both_devices(
    photos: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    files = sorted((photos / "train").glob("*/*"))
    samples = [local_sample(path, target=0, split="train") for path in files[:: max(1, len(files) // N_IMAGES)][:N_IMAGES]]
    assert len(samples) == N_IMAGES
    backbone = build_backbone("tf_efficientnet_lite0", weights="package")
    classifier = Classifier(backbone, 2).eval()
    found = {
        device: pooled_features(
            embedding_prefix(classifier), samples, Views(backbone.preprocess), FeatureContext(Store(tmp_path / device), device)
        )
        for device in ("cuda", "cpu")
    }
    on_gpu, on_cpu = found["cuda"], found["cpu"]
    cosines = (on_gpu * on_cpu).sum(1) / (np.linalg.norm(on_gpu, axis=1) * np.linalg.norm(on_cpu, axis=1))
    record_property("least_cosine", float(cosines.min()))
    record_property("largest_difference", float(np.abs(on_gpu - on_cpu).max()))
    record_property("features_rms", float(np.sqrt((on_cpu**2).mean())))
    assert cosines.min() > 0.999
