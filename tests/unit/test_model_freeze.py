"""From a method to the stages that train, and the table that shows it beforehand."""

from __future__ import annotations

import pytest

from finetune.errors import SpecError
from finetune.model.backbone import build_backbone
from finetune.model.selection import FreezePlan, describe_methods, plan_freeze
from finetune.model.stages import Stage
from finetune.spec import AutoMethod, Full, Gradual, LinearProbe, Partial

STAGES = tuple(Stage(i, name, (), (), (), 10 ** (i + 1), ()) for i, name in enumerate(["stem", "layer1", "layer2", "layer3"]))


def test_each_method_trains_its_stages() -> None:
    assert plan_freeze(STAGES, LinearProbe()) == FreezePlan(frozenset(), "frozen")
    assert plan_freeze(STAGES, AutoMethod()) == FreezePlan(frozenset(), "frozen")
    assert plan_freeze(STAGES, Partial()) == FreezePlan(frozenset({3}), "frozen")
    assert plan_freeze(STAGES, Partial(stages=2, bn="train")) == FreezePlan(frozenset({2, 3}), "train")
    assert plan_freeze(STAGES, Partial(stages=4)) == plan_freeze(STAGES, Full()) == plan_freeze(STAGES, Gradual())
    assert plan_freeze(STAGES, Full(bn="train")) == FreezePlan(frozenset({0, 1, 2, 3}), "train")
    assert plan_freeze(STAGES, Full(bn="recalibrate")).bn == "frozen"


def test_stages_can_be_named_in_any_order_and_need_not_be_neighbours() -> None:
    assert plan_freeze(STAGES, Partial(train=("layer3", "stem", "head"))).trainable == {0, 3}


def test_unknown_stage_names_are_all_reported_with_near_misses() -> None:
    with pytest.raises(SpecError) as caught:
        plan_freeze(STAGES, Partial(train=("layer4", "layer2", "Stem")))
    assert [str(problem) for problem in caught.value.problems] == [
        "method.train[0]: no stage 'layer4'; the stages are stem, layer1, layer2, layer3."
        " Did you mean 'layer3' or 'layer2' or 'layer1'?",
        "method.train[2]: no stage 'Stem'; the stages are stem, layer1, layer2, layer3. Did you mean 'stem'?",
    ]


def test_more_stages_than_there_are_is_an_error_that_names_them() -> None:
    with pytest.raises(SpecError) as caught:
        plan_freeze(STAGES, Partial(stages=5))
    assert str(caught.value.problems[0]) == (
        "method.stages: must be at most 4, given 5; the backbone's stages are stem, layer1, layer2, layer3"
    )


def test_the_table_tells_what_each_method_would_train() -> None:
    rows = [(choice.method, choice.trains, choice.n_parameters) for choice in describe_methods(STAGES)]
    assert rows == [
        ("linear_probe", (), 0),
        ("partial {stages: 1}", ("layer3",), 10_000),
        ("partial {stages: 2}", ("layer2", "layer3"), 11_000),
        ("partial {stages: 3}", ("layer1", "layer2", "layer3"), 11_100),
        ("full", ("stem", "layer1", "layer2", "layer3"), 11_110),
    ]


def test_the_table_of_a_known_network_has_its_published_size() -> None:
    choices = describe_methods(build_backbone("resnet50", weights="none", input_size_px=32).stages)
    assert choices[-1].n_parameters == 23_508_032  # 25,557,032 with its 1000-class layer
    assert choices[1].n_parameters == 14_964_736
    assert choices[1].fraction == pytest.approx(0.6366, abs=1e-4)
