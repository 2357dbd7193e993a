"""Logits, embeddings and the activation map that a pooled linear head gives for free."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional

from finetune.errors import InvalidInput
from finetune.model.auxiliary import AUX_LOSS_WEIGHT
from finetune.model.backbone import build_backbone
from finetune.model.classifier import Classifier, pool
from finetune.model.cut import cut_at

pytestmark = pytest.mark.usefixtures("one_torch_thread")

EXACT = {
    "test_resnet": "linear",
    "test_byobnet": "linear",
    "test_efficientnet": "linear",
    "test_nfnet": "linear",
    "test_maxvit": "linear",
    "test_vit": "linear",
    "resnet18": "linear",
    "densenet121": "linear",
    "inception_v3": "linear",
    "regnety_002": "linear",
    "swin_tiny_patch4_window7_224": "linear",
    "vgg11": "linear",
    "tf_efficientnet_lite0": "linear",
    "test_convnext": "layernorm",
    "test_convnext2": "layernorm",
    "test_vit2": "layernorm",
    "test_vit_relpos": "layernorm",
    "convnext_atto": "layernorm",
}
WITHOUT = ("mobilenetv3_large_100", "test_mambaout", "test_vit3")


@pytest.mark.parametrize("name", EXACT)
def test_the_mean_of_the_map_plus_the_bias_is_the_logit(name: str) -> None:
    classifier = build(name)
    assert classifier.cam_kind == EXACT[name]
    with torch.no_grad():
        logits, embedding, cam = classifier.explain(noise(classifier, 3))
    top = logits.argmax(1)
    assert cam is not None
    assert cam.ndim == 3
    torch.testing.assert_close(cam.mean((1, 2)) + classifier.head.bias[top], logits.max(1).values, rtol=1e-4, atol=1e-4)
    assert embedding.shape == (3, classifier.backbone.num_features)
    torch.testing.assert_close(classifier.head_logits(embedding), logits)


@pytest.mark.parametrize("name", WITHOUT)
def test_where_no_map_is_exact_there_is_none_and_a_reason(name: str) -> None:
    classifier = build(name)
    assert classifier.cam_kind is None
    assert classifier.cam_reason.startswith("after pooling the network applies pretrained layers (")
    with torch.no_grad():
        logits, embedding, cam = classifier.explain(noise(classifier, 2))
    assert cam is None
    assert embedding.shape == (2, classifier.backbone.num_features)
    assert logits.shape == (2, 4)


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_convnext", "test_mambaout", "mobilenetv3_large_100", "test_vit2"]
)
def test_the_embedding_is_what_timms_own_classifier_gets(name: str) -> None:
    classifier = build(name)
    images = noise(classifier, 2)
    module = classifier.backbone.module
    with torch.no_grad():
        expected = module.forward_head(module.forward_features(images), pre_logits=True)
        torch.testing.assert_close(classifier.embed(images), expected, rtol=1e-4, atol=1e-5)


def test_normalising_is_what_the_weights_were_trained_with() -> None:
    classifier = build("resnet18")
    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = timm.get_pretrained_cfg("resnet18")
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    expected = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(classifier.normalise(pixels), expected, rtol=1e-5, atol=1e-6)


def test_pooling_over_positions() -> None:
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    assert pool(maps, "avg").item() == 3.0
    assert pool(maps, "max").item() == 6.0
    assert pool(maps, "avgmax").item() == 4.5
    assert pool(maps, "gem").item() == pytest.approx(((1 + 8 + 27 + 216) / 4) ** (1 / 3))


@pytest.mark.parametrize("pooling", ["max", "avgmax", "gem"])
def test_other_poolings_classify_but_have_no_exact_map(pooling: str) -> None:
    classifier = build("test_resnet", pooling=pooling)
    assert (classifier.cam_kind, classifier.cam_reason) == (None, f"with {pooling} pooling a logit is not a mean over positions")
    images = noise(classifier, 2)
    with torch.no_grad():
        logits, _, cam = classifier.explain(images)
        maps = classifier.backbone.as_map(classifier.backbone(images))
    assert cam is None
    torch.testing.assert_close(
        logits, functional.linear(pool(maps, classifier.pooling), classifier.head.weight, classifier.head.bias)
    )


def test_layers_trained_on_averages_refuse_another_pooling() -> None:
    with pytest.raises(InvalidInput, match=r"model\.head\.pooling: only avg fits test_mambaout, given 'max': after pooling"):
        build("test_mambaout", pooling="max")


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(InvalidInput, match="'average' is not one of avg, max, avgmax, gem"):
        build("test_resnet", pooling="average")


def test_dropout_acts_before_the_head_and_only_in_training() -> None:
    classifier = build("test_resnet", dropout=0.5)
    embedding = torch.ones(1, classifier.backbone.num_features)
    assert torch.equal(classifier.head_logits(embedding), classifier.head(embedding))
    classifier.train()
    torch.manual_seed(0)
    assert not torch.equal(classifier.head_logits(embedding), classifier.head(embedding))


def test_an_auxiliary_head_trains_its_stage_and_is_not_in_the_exported_path() -> None:
    classifier = build("test_resnet", aux="layer2")
    images = noise(classifier, 2)
    logits, aux_logits = classifier.forward_with_aux(images)
    assert aux_logits.shape == logits.shape == (2, 4)
    (AUX_LOSS_WEIGHT * aux_logits.sum()).backward()
    reached = {
        name.split(".")[2] for name, p in classifier.named_parameters() if p.grad is not None and name.startswith("backbone")
    }
    assert reached == {"conv1", "bn1", "layer1", "layer2"}
    plain = build("test_resnet")
    missing, unexpected = plain.load_state_dict(classifier.state_dict(), strict=False)
    assert (missing, set(unexpected)) == ([], {"aux.linear.weight", "aux.linear.bias"})
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), classifier.eval()(images))


@pytest.mark.parametrize(
    ("name", "stage"), [("inception_v3", "Mixed_6"), ("test_vit", "blocks.4"), ("swin_tiny_patch4_window7_224", "layers.2")]
)
def test_the_architectures_own_place_for_an_auxiliary_head_is_the_stage_before_the_last(name: str, stage: str) -> None:
    classifier = build(name, aux=True)
    assert classifier.aux is not None
    assert classifier.backbone.stages[classifier.aux.stage].name == stage
    with torch.no_grad():
        assert classifier.forward_with_aux(noise(classifier, 2))[1].shape == (2, 4)


def test_an_auxiliary_head_hears_its_stage_behind_a_cut() -> None:
    classifier = build("test_resnet", aux="layer3")
    images = noise(classifier, 2)
    cut = cut_at(classifier, 2)
    assert classifier.aux is not None
    with torch.no_grad():
        with classifier.aux.recording(classifier.backbone) as activations:
            logits = cut.suffix(cut.prefix(images))
        whole = classifier.forward_with_aux(images)
        assert torch.equal(logits, whole[0])
        assert torch.equal(classifier.aux(activations[-1]), whole[1])


def test_an_auxiliary_head_on_no_inner_stage_is_refused() -> None:
    with pytest.raises(
        InvalidInput, match=r"no inner stage 'layer22'; allowed are true or stem, layer1, layer2, layer3\. Did you mean 'layer2'"
    ):
        build("test_resnet", aux="layer22")


def build(name: str, **options: object) -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier(build_backbone(name, weights="none"), num_classes=4, **options).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in classifier.head.parameters():
            parameter.uniform_(-0.5, 0.5)
    return classifier


def noise(classifier: Classifier, count: int) -> torch.Tensor:
    return torch.randn(count, 3, *classifier.backbone.preprocess.input_size_px, generator=torch.Generator().manual_seed(1))
