"""Frozen means: no gradient, no optimiser state, no weight decay, no drift of running statistics. For every family and method."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import timm
import torch
from torch import Tensor, nn

from finetune.model.backbone import build_backbone
from finetune.model.classifier import Classifier
from finetune.model.freeze import apply_freeze, frozen_digest, parameter_groups
from finetune.model.selection import FreezePlan, plan_freeze
from finetune.spec import Full, LinearProbe, Method, Partial

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# The side that keeps a network quick; None is its own, where its window or grid needs it.
TINY: dict[str, int | None] = dict.fromkeys(timm.list_models("test_*"), 64) | {"test_coatnet": 96, "test_maxvit": 96}
SMALL: dict[str, int | None] = {
    "resnet18": 64,
    "tf_efficientnet_lite0": 64,
    "mobilenetv3_large_100": 64,
    "regnetx_002": 64,
    "regnety_002": 64,
    "convnext_atto": 64,
    "densenet121": 64,
    "inception_v3": 96,
}
EVERY: dict[str, int | None] = {
    "resnet18": 96,
    "resnet50": 96,
    "vgg16": 96,
    "vgg16_bn": 96,
    "inception_v3": 299,
    "inception_v4": 299,
    "densenet121": 96,
    "efficientnet_b0": 96,
    "tf_efficientnet_lite0": 96,
    "mobilenetv3_large_100": 96,
    "regnetx_002": 96,
    "regnety_002": 96,
    "convnext_atto": 96,
    "convnext_tiny": 96,
    "vit_tiny_patch16_224": None,
    "swin_tiny_patch4_window7_224": None,
}
METHODS = ("linear_probe", "partial by number", "partial by name", "full")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*TINY, *SMALL])
def test_what_is_frozen_stays_and_what_is_not_learns(name: str, method: str) -> None:
    classifier = fresh_classifier(name, (TINY | SMALL)[name])
    check_two_steps(classifier, asked(classifier, method))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EVERY)
def test_what_is_frozen_stays_and_what_is_not_learns_in_every_family(name: str, method: str) -> None:
    classifier = fresh_classifier(name, EVERY[name])
    check_two_steps(classifier, asked(classifier, method))


def test_the_families_with_batch_norm_are_among_those_tried() -> None:
    with_statistics = [name for name in SMALL if statistics(fresh_classifier(name, SMALL[name]).backbone.module)]
    assert len(with_statistics) == 7  # all of SMALL but convnext_atto


def test_statistics_of_trainable_stages_move_only_under_the_train_policy() -> None:
    for bn, moves in (("frozen", False), ("train", True)):
        classifier = fresh_classifier("test_resnet", 64)
        before = statistics(classifier.backbone.module)
        apply_freeze(classifier, plan_freeze(classifier.backbone.stages, Full(bn=bn)))
        two_steps(classifier)
        after = statistics(classifier.backbone.module)
        assert len(before) > 20
        assert [not torch.equal(before[key], after[key]) for key in before] == [moves] * len(before)


def test_a_parents_train_call_does_not_wake_what_is_frozen() -> None:
    classifier = fresh_classifier("test_resnet", 64)
    apply_freeze(classifier, plan_freeze(classifier.backbone.stages, Partial(train=("layer4",))))
    parent = nn.Sequential(classifier)
    for _ in range(2):
        parent.eval()
        parent.train()
    training = {name for name, module in classifier.backbone.module.named_modules() if module.training}
    assert training
    assert all(
        name.startswith("layer4") or name in {"global_pool", "global_pool.pool", "global_pool.flatten", "fc"} for name in training
    )


def test_dropout_and_stochastic_depth_of_frozen_stages_are_off() -> None:
    classifier = fresh_classifier("test_vit", 64)
    for block in classifier.backbone.module.blocks:
        block.drop_path1 = nn.Dropout(0.5)
    apply_freeze(classifier, plan_freeze(classifier.backbone.stages, Partial(stages=1)))
    classifier.train()
    assert [block.drop_path1.training for block in classifier.backbone.module.blocks] == [False] * 5 + [True]
    assert not classifier.backbone.module.pos_drop.training


def test_a_later_plan_thaws_again() -> None:
    classifier = fresh_classifier("test_resnet", 64)
    apply_freeze(classifier, FreezePlan(frozenset()))
    apply_freeze(classifier, FreezePlan(frozenset({3, 4}), bn="train"))
    classifier.train()
    assert classifier.backbone.module.layer4.training
    assert not classifier.backbone.module.layer2.training
    assert [group.name for group in parameter_groups(classifier)] == ["layer3", "layer4", "head"]


def test_the_digest_sees_a_single_changed_value_of_a_parameter_or_buffer() -> None:
    classifier = fresh_classifier("test_resnet", 64)
    apply_freeze(classifier, plan_freeze(classifier.backbone.stages, LinearProbe()))
    digests = {frozen_digest(classifier)}
    with torch.no_grad():
        classifier.backbone.module.conv1[0].weight[0, 0, 0, 0] += 1e-6
    digests.add(frozen_digest(classifier))
    classifier.backbone.module.layer1[0].bn1.num_batches_tracked += 1
    digests.add(frozen_digest(classifier))
    classifier.head.weight.data += 1
    digests.add(frozen_digest(classifier))  # the head is not frozen
    assert len(digests) == 3


def check_two_steps(classifier: Classifier, method: Method) -> None:
    apply_freeze(classifier, plan_freeze(classifier.backbone.stages, method))
    digest = frozen_digest(classifier)
    frozen_before = frozen_tensors(classifier)
    trained_before = {name: value.detach().clone() for name, value in trainable(classifier).items()}
    two_steps(classifier)
    assert frozen_digest(classifier) == digest
    assert all(torch.equal(value, frozen_before[name]) for name, value in frozen_tensors(classifier).items())
    changed = {name for name, value in trainable(classifier).items() if not torch.equal(value, trained_before[name])}
    assert changed == set(trained_before)
    assert len(frozen_before) + len(trained_before) > 10


def two_steps(classifier: Classifier) -> None:
    """Two AdamW steps with weight decay in train mode; a gradient must reach whatever trains."""
    torch.manual_seed(1)
    h, w = classifier.backbone.preprocess.input_size_px
    groups = parameter_groups(classifier)
    optimiser = torch.optim.AdamW([{"params": list(group.parameters.values())} for group in groups], lr=1e-3, weight_decay=0.1)
    classifier.train()
    for _ in range(2):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(classifier(torch.randn(2, 3, h, w)), torch.tensor([0, 1]))
        loss.backward()
        without_gradient = {name for name, parameter in classifier.named_parameters() if parameter.grad is None}
        assert without_gradient == {name for name, parameter in classifier.named_parameters() if not parameter.requires_grad}
        optimiser.step()
    held = {parameter for group in optimiser.param_groups for parameter in group["params"]}
    assert held == {parameter for parameter in classifier.parameters() if parameter.requires_grad} == set(optimiser.state)


def asked(classifier: Classifier, method: str) -> Method:
    stages = classifier.backbone.stages
    return {
        "linear_probe": LinearProbe(),
        "partial by number": Partial(stages=1),
        "partial by name": Partial(train=(stages[1].name, stages[-1].name), bn="train"),
        "full": Full(bn="train"),
    }[method]


def fresh_classifier(name: str, side: int | None) -> Classifier:
    return copy.deepcopy(_built(name, side))


@cache
def _built(name: str, side: int | None) -> Classifier:
    torch.manual_seed(0)
    return Classifier(build_backbone(name, weights="none", input_size_px=side or "auto"), num_classes=3)


def trainable(classifier: Classifier) -> dict[str, Tensor]:
    return {name: parameter for group in parameter_groups(classifier) for name, parameter in group.parameters.items()}


def frozen_tensors(classifier: Classifier) -> dict[str, Tensor]:
    stage_of, module = classifier.backbone.layout.tensor_stage, classifier.backbone.module
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors if stage_of[name] not in classifier.plan.trainable}


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers() if "running_" in name or "num_batches" in name}
