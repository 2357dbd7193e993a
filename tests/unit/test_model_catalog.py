from __future__ import annotations

import pytest

from finetune.backbone_names import problem_of_name, split_name
from finetune.errors import UnknownBackbone
from finetune.model.catalog import all_names, list_backbones, pretrained_cfg


def test_a_pattern_lists_what_it_matches_and_a_word_what_contains_it() -> None:
    assert list_backbones("resnet18*") == ("resnet18", "resnet18d")
    assert "tf_efficientnet_lite0" in list_backbones("efficientnet_lite")
    assert len(list_backbones()) > 1000


def test_a_misspelt_pattern_gets_near_misses() -> None:
    with pytest.raises(UnknownBackbone, match=r"no backbone matches 'resnt50'\. Did you mean 'resnet50'"):
        list_backbones("resnt50")


@pytest.mark.parametrize(
    ("given", "suggestion"),
    [
        ("resnet188", "Did you mean 'resnet18'"),
        ("ResNet50", "Did you mean 'resnet50'"),
        ("efficientnet-lite0", "Did you mean 'efficientnet_lite0'"),
        ("mobilenetv3", "Names like it: mobilenetv3_large_075, "),
    ],
)
def test_an_unknown_architecture_is_refused_with_suggestions(given: str, suggestion: str) -> None:
    with pytest.raises(UnknownBackbone) as caught:
        pretrained_cfg(given)
    assert f"timm has no architecture {given!r}." in caught.value.message
    assert suggestion in caught.value.message


def test_an_unknown_tag_is_refused_with_the_tags_there_are() -> None:
    with pytest.raises(UnknownBackbone, match=r"no weights tagged 'a9_in1k'; its tags are a1_in1k, .* Did you mean 'ra_in1k'"):
        pretrained_cfg("resnet50.a9_in1k")


def test_a_tag_chooses_its_own_preprocessing() -> None:
    plain, newer = pretrained_cfg("resnet50.tv_in1k"), pretrained_cfg("resnet50.a1_in1k")
    assert (plain["interpolation"], newer["interpolation"]) == ("bilinear", "bicubic")
    assert plain["architecture"] == newer["architecture"] == "resnet50"
    assert split_name("resnet50.tv_in1k") == ("resnet50", "tv_in1k")


def test_every_name_of_the_catalogue_is_a_backbone() -> None:
    names = all_names()[::100]
    assert len(names) > 20
    assert all(pretrained_cfg(name)["architecture"] == name.partition(".")[0] for name in names)


def test_the_list_of_names_alone_tells_what_timm_tells() -> None:
    """A server answers from the list, and a job with timm; both say the same."""
    names = all_names()
    for name in ("resnet50.a9_in1k", "resnet188", "ResNet50", "mobilenetv3", "resnet18.", "x" * 300):
        with pytest.raises(UnknownBackbone) as caught:
            pretrained_cfg(name)
        assert caught.value.message == f"model.backbone: {problem_of_name(name, names)}"
    for name in ("resnet50", "resnet50.a1_in1k", "test_resnet", "gluon_resnet50_v1b"):
        assert problem_of_name(name, names) is None
        assert pretrained_cfg(name)["architecture"] == name.partition(".")[0]
