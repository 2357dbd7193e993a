"""The packaged weights, mapped by order, recognise what is on real photographs: mapping, preprocessing and padding are right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data import ImageNetInfo
from torch import nn

from finetune.model.backbone import build_backbone
from finetune.model.classifier import Classifier
from finetune.model.weights import resolve_weights

pytestmark = pytest.mark.usefixtures("one_torch_thread")

NAME = "tf_efficientnet_lite0"
N_PHOTOS = 12
# Our folder, the ImageNet class nearest to it, how many of twelve must be named so (chance is 0.012 of them).
NEAREST = (
    ("t-shirt", {"jersey"}, 7),
    ("pants", {"jean"}, 5),
    ("shoes", {"running shoe", "Loafer", "clog", "sandal", "cowboy boot"}, 9),
)


def test_the_packaged_weights_name_what_photographs_show(photos: Path) -> None:
    network, classifier = imagenet_network(), Classifier(build_backbone(NAME), num_classes=2).eval()
    info = ImageNetInfo()
    for folder, names, at_least in NEAREST:
        files = sorted((photos / "validation" / folder).iterdir())[:N_PHOTOS]
        pixels = np.stack([classifier.backbone.preprocess.load_file(file) for file in files])
        with torch.no_grad():
            labels = network(classifier.normalise(torch.from_numpy(pixels))).argmax(1).tolist()
        named = [info.index_to_description(label).split(",")[0] for label in labels]
        assert len(named) == N_PHOTOS
        assert sum(name in names for name in named) >= at_least, named


def test_the_backbone_computes_what_the_whole_network_computes() -> None:
    network, classifier = imagenet_network(), Classifier(build_backbone(NAME), num_classes=1000).eval()
    classifier.head.load_state_dict(network.classifier.state_dict())
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(classifier(images), network(images), rtol=1e-4, atol=1e-4)


def imagenet_network() -> nn.Module:
    """timm's whole network, classifier included, with the packaged weights."""
    network: nn.Module = timm.create_model(NAME).eval()
    state_dict = resolve_weights(NAME, "package").state_dict
    assert state_dict is not None
    network.load_state_dict(state_dict)
    return network
