"""A classifier cut at a stage boundary gives, bit for bit, what it gives whole; and its parts hold every tensor exactly once."""

from __future__ import annotations

from functools import cache

import pytest
import timm
import torch
from torch import nn

from finetune.model.backbone import build_backbone
from finetune.model.classifier import Classifier
from finetune.model.cut import cut_at, why_not_cut
from finetune.model.freeze import apply_freeze
from finetune.model.selection import plan_freeze
from finetune.spec import Partial

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TINY = tuple(timm.list_models("test_*"))
SMALL = {
    "resnet18": 64,
    "tf_efficientnet_lite0": 64,
    "mobilenetv3_large_100": 64,
    "regnety_002": 64,
    "convnext_atto": 64,
    "densenet121": 64,
    "inception_v3": 96,
}
EVERY = (
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
    "regnetx_002",
    "regnety_002",
    "convnext_atto",
    "convnext_tiny",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
)


@pytest.mark.parametrize("name", [*TINY, *SMALL])
def test_a_cut_network_is_bit_equal_to_the_whole(name: str) -> None:
    check_cuts(name, SMALL.get(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_a_cut_network_is_bit_equal_to_the_whole_in_every_family(name: str) -> None:
    check_cuts(name)


@pytest.mark.parametrize("name", [*TINY, *SMALL])
def test_every_tensor_belongs_to_exactly_one_stage(name: str) -> None:
    check_stages(name, SMALL.get(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_tensor_belongs_to_exactly_one_stage_in_every_family(name: str) -> None:
    check_stages(name)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_training_behind_a_cut_takes_the_same_step_as_training_the_whole(name: str) -> None:
    gradients = []
    for is_cut in (False, True):
        torch.manual_seed(0)
        classifier = Classifier(build_backbone(name, weights="none"), num_classes=3)
        apply_freeze(classifier, plan_freeze(classifier.backbone.stages, Partial(stages=2, bn="train")))
        classifier.train()
        images = noise(classifier, 4)
        cut = cut_at(classifier, len(classifier.backbone.stages) - 2)
        with torch.no_grad():
            cached = cut.prefix(images)
        logits = cut.suffix(cached) if is_cut else classifier(images)
        nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
        gradients.append({key: parameter.grad for key, parameter in classifier.named_parameters() if parameter.requires_grad})
    whole, behind = gradients
    assert len(whole) > 10
    assert all(torch.equal(whole[key], behind[key]) for key in whole)


def test_the_prefix_follows_the_classifiers_weights() -> None:
    classifier = Classifier(build_backbone("test_resnet", weights="none"), num_classes=3).eval()
    cut = cut_at(classifier, 2)
    images = noise(classifier, 1)
    with torch.no_grad():
        before = cut.prefix(images)
        classifier.backbone.module.conv1[0].weight *= 2
        assert not torch.equal(cut.prefix(images), before)
        assert torch.equal(cut.suffix(cut.prefix(images)), classifier(images))


def test_blocks_that_share_a_position_table_can_be_cut() -> None:
    check_cuts("vit_small_patch16_dinov3", 64)


def test_a_network_whose_blocks_share_a_tensor_says_why_it_cannot_be_cut() -> None:
    backbone = build_backbone("mvitv2_tiny", weights="none")
    assert why_not_cut(backbone, 1) == "from there on its modules exchange more than one activation"
    assert why_not_cut(backbone, len(backbone.stages)) == ""
    assert why_not_cut(backbone, 0) == "a cut is before one of the stages 1 to 5"
    with pytest.raises(ValueError, match="mvitv2_tiny cannot be cut before stage 1: from there on"):
        cut_at(Classifier(backbone, 3), 1)


def check_cuts(name: str, side: int | None = None) -> None:
    classifier = built(name, side)
    images = noise(classifier, 2)
    n_stages = len(classifier.backbone.stages)
    assert n_stages >= 4
    with torch.no_grad():
        whole = classifier(images)
        assert whole.isfinite().all()
        for stage in range(1, n_stages + 1):
            cut = cut_at(classifier, stage)
            activation = cut.prefix(images)
            assert tuple(activation.shape[1:]) == cut.activation_shape
            assert torch.equal(cut.suffix(activation), whole)


def check_stages(name: str, side: int | None = None) -> None:
    backbone = built(name, side).backbone
    module, stages = backbone.module, backbone.stages
    assert [stage.index for stage in stages] == list(range(len(stages)))
    assert stages[0].name == "stem"
    assert len({stage.name for stage in stages}) == len(stages)
    assert sorted(key for stage in stages for key in stage.parameters) == sorted(key for key, _ in module.named_parameters())
    assert sorted(key for stage in stages for key in stage.buffers) == sorted(key for key, _ in module.named_buffers())
    assert backbone.n_parameters == sum(parameter.numel() for parameter in module.parameters())
    assert all(stage.n_parameters > 0 for stage in stages)
    assert set(backbone.layout.module_stages) == {key for key, _ in module.named_modules()}
    assert all(backbone.layout.module_stages.values())


@cache
def built(name: str, side: int | None) -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier(build_backbone(name, weights="none", input_size_px=side or "auto"), num_classes=5).eval()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter += 0.02 * torch.randn_like(parameter)  # many a residual branch starts at zero and would hide mistakes
    return classifier


def noise(classifier: Classifier, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *classifier.backbone.preprocess.input_size_px, generator=generator)
