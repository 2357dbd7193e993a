"""Stages with the names that people use, the preprocessing of the weights, and the sizes a network can take."""

from __future__ import annotations

import pytest
import torch

from finetune.errors import InvalidInput
from finetune.model.backbone import build_backbone
from finetune.model.classifier import Classifier
from finetune.training.machine import Numerics, place

pytestmark = pytest.mark.usefixtures("one_torch_thread")

NAMES = {
    "resnet18": "stem layer1 layer2 layer3 layer4",
    "tf_efficientnet_lite0": "stem blocks.0 blocks.1 blocks.2 blocks.3 blocks.4 blocks.5 blocks.6",
    "mobilenetv3_large_100": "stem blocks.0 blocks.1 blocks.2 blocks.3 blocks.4 blocks.5 blocks.6",
    "vgg11": "stem block2 block3 block4 block5",
    "inception_v3": "stem Mixed_5 Mixed_6 Mixed_7",
    "inception_v4": "stem inception_a inception_b inception_c",
    "densenet121": "stem denseblock1 denseblock2 denseblock3 denseblock4",
    "regnety_002": "stem s1 s2 s3 s4",
    "convnext_atto": "stem stages.0 stages.1 stages.2 stages.3",
    "swin_tiny_patch4_window7_224": "stem layers.0 layers.1 layers.2 layers.3",
    "test_vit": "stem blocks.0 blocks.1 blocks.2 blocks.3 blocks.4 blocks.5",
    "poolformer_s12": "stem stages.0 stages.1 stages.2 stages.3",  # timm has no groups for it
}
SIDES = {"inception_v3": 96, "inception_v4": 96, "swin_tiny_patch4_window7_224": "auto", "test_vit": "auto"}


@pytest.mark.parametrize("name", NAMES)
def test_stages_carry_the_names_of_the_architecture(name: str) -> None:
    stages = build_backbone(name, weights="none", input_size_px=SIDES.get(name, 64)).stages  # type: ignore[arg-type]
    assert " ".join(stage.name for stage in stages) == NAMES[name]


def test_what_stands_alone_joins_the_stage_it_belongs_to() -> None:
    owner = {
        (name, parameter): stage.name
        for name in ("densenet121", "swin_tiny_patch4_window7_224", "convnext_atto", "mobilenetv3_large_100", "test_vit")
        for stage in build_backbone(name, weights="none").stages
        for parameter in stage.parameters
    }
    assert owner["densenet121", "features.transition1.conv.weight"] == "denseblock1"
    assert owner["densenet121", "features.norm5.weight"] == "denseblock4"
    assert owner["swin_tiny_patch4_window7_224", "norm.weight"] == "layers.3"
    assert owner["convnext_atto", "head.norm.weight"] == "stages.3"
    assert owner["mobilenetv3_large_100", "conv_head.weight"] == "blocks.6"
    assert owner["test_vit", "pos_embed"] == owner["test_vit", "cls_token"] == "stem"


def test_a_pool_ends_the_stage_before_it() -> None:
    stages = build_backbone("vgg11", weights="none", input_size_px=64).stages
    assert [stage.output_shape for stage in stages] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]
    assert stages[0].modules == ("features.0", "features.1", "features.2")


def test_vgg_leaves_its_fully_connected_layers_out() -> None:
    backbone = build_backbone("vgg11", weights="none", input_size_px=64)
    assert backbone.n_parameters == 9_220_480  # 132.9 million with them
    assert backbone.num_features == 512
    assert "fc6 and fc7 are left out" in backbone.readout.note


def test_an_unused_attention_pool_is_kept_only_where_the_head_stands_on_it() -> None:
    kept = build_backbone("test_vit3", weights="none")
    assert kept.readout.kind == "own"
    assert any("attn_pool" in name for stage in kept.stages[-1:] for name in stage.parameters)


@pytest.mark.parametrize(
    ("name", "side", "crop_fraction", "interpolation", "mean"),
    [
        ("tf_efficientnet_lite0", 224, 0.875, "bicubic", 0.5),
        ("tf_efficientnet_lite1", 240, 0.882, "bicubic", 0.5),
        ("tf_efficientnet_lite2", 260, 0.89, "bicubic", 0.5),
        ("resnet18.tv_in1k", 224, 0.875, "bilinear", 0.485),
        ("inception_v3", 299, 0.875, "bicubic", 0.5),
    ],
)
def test_preprocessing_is_that_of_the_weights(
    name: str, side: int, crop_fraction: float, interpolation: str, mean: float
) -> None:
    preprocess = build_backbone(name, weights="none").preprocess
    assert preprocess.input_size_px == (side, side)
    assert (preprocess.resize, preprocess.crop_fraction) == ("crop", crop_fraction)
    assert (preprocess.interpolation, preprocess.mean[0]) == (interpolation, mean)


def test_framing_follows_the_weights_unless_asked_otherwise() -> None:
    squashed = build_backbone("vit_small_patch16_lingbot", weights="none", input_size_px=64).preprocess
    assert (squashed.resize, squashed.crop_fraction) == ("squash", 1.0)
    letterboxed = build_backbone("tf_efficientnet_lite0", weights="none", resize="letterbox").preprocess
    assert (letterboxed.resize, letterboxed.crop_fraction, letterboxed.fill) == ("letterbox", 1.0, (128, 128, 128))


@pytest.mark.parametrize(("name", "side", "grid"), [("test_vit", 96, 6), ("test_resnet", 96, 3), ("convnext_atto", 64, 2)])
def test_the_input_size_can_be_chosen_where_the_network_allows(name: str, side: int, grid: int) -> None:
    backbone = build_backbone(name, weights="none", input_size_px=side)
    assert backbone.preprocess.input_size_px == (side, side)
    maps = backbone.as_map(backbone(torch.zeros(2, 3, side, side)))
    assert maps.shape == (2, backbone.num_features, grid, grid)


@pytest.mark.parametrize("name", ["inception_v3", "test_coatnet", "test_maxvit"])
def test_a_size_the_network_cannot_take_is_refused_with_its_own(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        build_backbone(name, weights="none", input_size_px=40)
    assert caught.value.message.startswith(f"model.input_size_px: {name} cannot take images of 40 px (")
    assert "leave it at auto, or try another multiple of 32" in caught.value.message


def test_a_network_that_ends_in_several_feature_maps_keeps_its_own_pooling() -> None:
    backbone = build_backbone("crossvit_tiny_240", weights="none")
    classifier = Classifier(backbone, num_classes=3).eval()
    images = torch.rand(2, 3, 240, 240, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, embedding, cam = classifier.explain(images)
        expected = backbone.module.forward_head(backbone.module.forward_features(images), pre_logits=True)
    assert torch.equal(embedding, expected)
    assert logits.shape == (2, 3)
    assert cam is None
    assert "several feature maps" in classifier.cam_reason
    with pytest.raises(InvalidInput, match=r"model\.head\.aux: stage .* ends in several maps"):
        Classifier(backbone, num_classes=3, aux=True)


def test_a_rectangular_token_grid_keeps_its_shape() -> None:
    feature_format = build_backbone("test_vit", weights="none").feature_format
    tokens = torch.arange(1 + 2 * 8, dtype=torch.float32).view(1, -1, 1)
    wide = type(feature_format)(channels_last=False, n_prefix_tokens=1, aspect=0.25)
    assert wide.as_map(tokens)[0, 0].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16]]


def test_weights_of_five_dimensions_are_laid_out_for_training_too() -> None:
    classifier = Classifier(build_backbone("lambda_resnet26t", weights="none", input_size_px=64), num_classes=3)
    five = [name for name, parameter in classifier.named_parameters() if parameter.ndim == 5]
    place(classifier, Numerics("cpu", "float32", True, 1))
    assert len(five) == 3
    convolution = next(parameter for parameter in classifier.parameters() if parameter.ndim == 4 and min(parameter.shape) > 1)
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    assert classifier(images).shape == (1, 3)
