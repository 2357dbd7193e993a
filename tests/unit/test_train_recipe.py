"""The recipe: every `auto` resolved with its source, phases that add up, learning rates that only the step decides."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest

from finetune.errors import SpecError
from finetune.spec import parse_spec
from finetune.training.recipe import (
    Facts,
    Recipe,
    default_layer_decay,
    freeze_plan,
    learning_rates,
    resolve_recipe,
    schedule_factor,
    unfreeze_schedule,
)

CLOTHING = Facts(n_train=3068, n_val=341, n_classes=10, n_parameters=3_371_008)


@dataclass(frozen=True)
class NamedStage:
    index: int
    name: str


STAGES = [NamedStage(0, "stem"), *(NamedStage(index, f"blocks.{index - 1}") for index in range(1, 8))]


def recipe_for(method: Any, facts: Facts = CLOTHING, **hyperparameters: Any) -> Recipe:
    spec = parse_spec({"training_file": "photos", "method": method, "hyperparameters": hyperparameters})
    return resolve_recipe(spec, facts, STAGES)  # type: ignore[arg-type]


def test_full_begins_with_the_solved_head_and_then_trains_every_stage_slower_towards_the_stem() -> None:
    recipe = recipe_for("full")
    probe, full = recipe.phases
    assert probe.solved
    assert probe.n_steps == 0
    assert full.trainable == tuple(range(8))
    assert full.stage_lr[7] == full.head_lr == pytest.approx(3e-4)
    assert [full.stage_lr[index + 1] * 0.6 for index in range(7)] == pytest.approx([full.stage_lr[index] for index in range(7)])
    assert (recipe.batch_size, recipe.n_epochs, recipe.label_smoothing) == (32, 8, 0.1)
    assert recipe.n_steps == full.n_steps == 8 * 96


def test_steps_are_taken_on_smaller_images_where_the_backbone_is_free_to_and_nothing_is_cached() -> None:
    assert recipe_for("full").train_size_px == (176, 176)
    assert recipe_for("gradual", replace(CLOTHING, input_size_px=(299, 299))).train_size_px == (240, 240)
    assert recipe_for("full", replace(CLOTHING, input_size_px=(256, 128))).train_size_px == (256, 128)  # 96 would show too little
    assert recipe_for("full", replace(CLOTHING, resizable=False)).train_size_px == (224, 224)
    assert recipe_for("full", replace(CLOTHING, pretrained=False)).train_size_px == (224, 224)
    assert recipe_for("partial").train_size_px == (224, 224)
    assert recipe_for("full", train_size_px=160).train_size_px == (160, 160)
    assert recipe_for("full", replace(CLOTHING, input_size_px=(384, 192)), train_size_px=160).train_size_px == (320, 160)


def test_a_size_that_cannot_be_trained_on_is_refused_with_the_reason() -> None:
    assert recipe_for("partial", train_size_px=224).train_size_px == (224, 224)
    with pytest.raises(SpecError, match="train_size_px: 160 is given and the input size is 224×224, but method partial"):
        recipe_for("partial", train_size_px=160)
    with pytest.raises(SpecError, match="takes images of one size only"):
        recipe_for("full", replace(CLOTHING, resizable=False), train_size_px=160)


def test_a_cold_head_is_no_phase_and_learns_faster_than_the_backbone() -> None:
    (full,) = recipe_for({"type": "full", "warm_head": False}).phases
    assert not full.solved
    assert full.head_lr > full.stage_lr[7]


def test_linear_probe_takes_no_steps_and_trains_no_stage() -> None:
    recipe = recipe_for("linear_probe")
    assert recipe.n_steps == 0
    assert recipe.trainable == ()
    assert recipe.ema_half_life_steps is None


def test_partial_trains_the_stages_asked_for_the_topmost_fastest() -> None:
    assert recipe_for({"type": "partial", "stages": 2}).phases[1].trainable == (6, 7)
    named = recipe_for({"type": "partial", "train": ["blocks.1", "stem"]}).phases[1]
    assert named.trainable == (0, 2)
    assert named.stage_lr[2] == pytest.approx(3e-4)


def test_an_unknown_stage_is_refused_with_the_near_miss() -> None:
    with pytest.raises(SpecError, match=r"Did you mean 'blocks\.6'"):
        recipe_for({"type": "partial", "train": ["block.6"]})


def test_gradual_thaws_from_the_top_and_ends_with_everything() -> None:
    recipe = recipe_for({"type": "gradual", "epochs_per_stage": 2})
    probe, *phases = recipe.phases
    assert probe.solved
    assert [phase.trainable for phase in phases] == [tuple(range(first, 8)) for first in range(7, -1, -1)]
    assert [phase.n_epochs for phase in phases] == [2] * 8
    assert [phase.decay for phase in phases] == ["none"] * 7 + ["cosine"]


@pytest.mark.parametrize(
    ("n_stages", "n_epochs", "each"), [(8, 6, None), (8, 20, None), (5, 7, 2), (3, 1, None), (3, 2, 5), (1, 4, 1)]
)
def test_a_thaw_schedule_spends_exactly_its_epochs_and_ends_with_every_stage(
    n_stages: int, n_epochs: int, each: int | None
) -> None:
    spans = unfreeze_schedule(n_stages, n_epochs, each)
    assert sum(epochs for _, epochs in spans) == n_epochs
    assert all(epochs >= 1 for _, epochs in spans)
    assert spans[-1][0] == tuple(range(n_stages))
    assert all(set(earlier) < set(later) for (earlier, _), (later, _) in itertools.pairwise(spans))


def test_every_resolved_value_says_where_it_came_from() -> None:
    recipe = recipe_for("full", learning_rate=0.001, n_epochs=2)
    assert recipe.sources["hyperparameters.learning_rate"] == "given"
    assert recipe.sources["hyperparameters.n_epochs"] == "given"
    assert "AdamW" in recipe_for("full").sources["hyperparameters.learning_rate"]
    autos = {path for path in recipe.sources if path.startswith("hyperparameters.")}
    assert autos == {
        f"hyperparameters.{name}"
        for name in (
            "n_epochs", "batch_size", "train_size_px", "learning_rate", "learning_rate_multiplier", "weight_decay",
            "label_smoothing", "loss",
            "warmup_fraction", "early_stopping_epochs", "ema", "l2", "views",
        )
    }  # fmt: skip
    assert all(recipe.sources.values())


def test_the_multiplier_scales_the_automatic_learning_rate() -> None:
    assert recipe_for("full", learning_rate_multiplier=0.5).phases[1].head_lr == pytest.approx(1.5e-4)


def test_the_automatic_learning_rate_grows_with_the_root_of_the_batch() -> None:
    assert recipe_for("full", batch_size=128).phases[1].head_lr == pytest.approx(6e-4)


def test_a_batch_larger_than_the_training_set_becomes_the_training_set() -> None:
    recipe = recipe_for("full", Facts(n_train=20, n_val=5, n_classes=2, n_parameters=1), batch_size=64)
    assert recipe.batch_size == 20
    assert recipe.steps_per_epoch == 1
    assert "lowered from 64" in recipe.sources["hyperparameters.batch_size"]


def test_equal_requests_and_facts_give_equal_recipes() -> None:
    assert recipe_for("gradual") == recipe_for("gradual")


def test_few_images_get_no_smoothing_and_short_schedules_no_early_stop() -> None:
    few = recipe_for("full", Facts(n_train=300, n_val=50, n_classes=10, n_parameters=1))
    assert few.label_smoothing == 0.0
    assert few.n_epochs == 30
    assert few.early_stopping_epochs == 10
    assert recipe_for("full", n_epochs=6).early_stopping_epochs is None
    assert recipe_for("full", n_epochs=6, early_stopping_epochs=2).early_stopping_epochs == 2


def test_method_auto_has_no_recipe_of_its_own() -> None:
    spec = parse_spec({"training_file": "photos", "method": "auto"})
    with pytest.raises(ValueError, match="a study of several methods"):
        resolve_recipe(spec, CLOTHING, STAGES)  # type: ignore[arg-type]


def test_layer_decay_keeps_the_ratio_between_top_and_bottom_over_depths() -> None:
    assert default_layer_decay(8) == 0.6
    assert default_layer_decay(5) == 0.5
    assert 0.7 <= default_layer_decay(13) <= 0.78
    assert default_layer_decay(40) == 0.85


def test_the_schedule_warms_up_linearly_and_reaches_zero_at_the_end() -> None:
    factors = [schedule_factor(step, 100, 0.1, "cosine") for step in range(100)]
    assert factors[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.001
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_a_schedule_without_decay_stays_at_its_peak_and_a_linear_one_falls_evenly() -> None:
    assert {schedule_factor(step, 50, 0.0, "none") for step in range(50)} == {1.0}
    assert [schedule_factor(step, 4, 0.0, "linear") for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_learning_rates_are_a_function_of_the_step_over_all_phases() -> None:
    recipe = recipe_for({"type": "gradual", "epochs_per_stage": 1})
    n_seen = 0
    for step in range(recipe.n_steps):
        phase, _ = recipe.phase_at(step)
        assert set(learning_rates(recipe, step)) == {"head", *(f"stage{index}" for index in phase.trainable)}
        assert freeze_plan(recipe, phase).trainable == frozenset(phase.trainable)
        n_seen += 1
    assert n_seen == 8 * 96
    assert learning_rates(recipe, recipe.n_steps - 1)["head"] < 1e-3 * 3e-4 * math.pi
    with pytest.raises(IndexError, match="768"):
        recipe.phase_at(768)


def test_views_are_many_where_they_are_all_the_variety_there_is() -> None:
    assert [recipe_for("linear_probe", Facts(n, 50, 10, 1)).views for n in (300, 3000, 30_000)] == [4, 1, 1]
    assert recipe_for("partial").views == 4
    assert recipe_for("full").views == 1
    assert recipe_for("linear_probe", views=6).views == 6
