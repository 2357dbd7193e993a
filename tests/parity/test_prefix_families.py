"""ONNX Runtime computes the frozen prefix of every family as torch does, at the deepest cuts, at batches that were not traced."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from finetune.features.engine import OnnxEngine, agreement
from finetune.features.prefix import PixelPrefix, TorchEngine, activation_shape, export_prefix
from finetune.model.backbone import build_backbone
from finetune.model.classifier import Classifier
from finetune.model.cut import why_not_cut
from finetune.runtime.session import open_session

FAMILIES = (
    "resnet18",
    "resnet50",
    "vgg16",
    "vgg16_bn",
    "inception_v3",
    "inception_v4",
    "densenet121",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "mobilenetv3_large_100",
    "regnety_002",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_runtime_and_torch_compute_the_same_prefix(name: str) -> None:
    torch.manual_seed(0)
    classifier = Classifier(build_backbone(name, weights="none"), 10)
    n_stages = len(classifier.backbone.stages)
    cuts = [stage for stage in (n_stages, n_stages - 1) if not why_not_cut(classifier.backbone, stage)]
    assert n_stages in cuts
    images = np.random.default_rng(0).integers(0, 256, (3, *classifier.backbone.preprocess.input_size_px, 3), dtype=np.uint8)
    for stage in cuts:
        module = PixelPrefix(classifier, stage)
        engine = OnnxEngine(open_session(export_prefix(module)))
        expected = TorchEngine(module, "cpu", autocast=False).run(images)
        assert expected.shape == (3, *activation_shape(classifier, stage))
        assert agreement(engine.run(images), expected) > 0.999999
        np.testing.assert_allclose(engine.run(images[:1]), expected[:1], rtol=1e-2, atol=1e-3 * float(np.abs(expected).max()))
