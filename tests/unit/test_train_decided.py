"""What one run chose on its validation images is done again by another, which then chooses nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import path_of
from tiny_training import CLASSES, targets_of, tiny_classifier, tiny_recipe, train_tiny, write_images

from finetune.data.augment import build_augment
from finetune.data.dataset import Dataset, Sample
from finetune.data.split import split_dataset
from finetune.features.prefix import embedding_prefix
from finetune.features.rows import FeatureContext, Views, pooled_features
from finetune.features.softmax_head import solve_softmax_head
from finetune.features.solve import SolvedHead
from finetune.model.classifier import Classifier
from finetune.runs.prepare import with_val_as_train
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store
from finetune.tasks import task_named
from finetune.training.choices import Choices
from finetune.training.compute import Compute
from finetune.training.context import TrainingContext
from finetune.training.head import solve_head
from finetune.training.recipe import Recipe, refit_recipe

pytestmark = pytest.mark.usefixtures("one_torch_thread")

EVERYTHING = {"n_epochs": 3, "batch_size": 6, "learning_rate": 0.01, "ema": True}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The traced prefix and the features in it serve all tests of this file."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return write_images(tmp_path_factory.mktemp("images"), 36)


@pytest.fixture(scope="module")
def dataset(samples: list[Sample]) -> Dataset:
    root = path_of(samples[0]).parent
    loose = Dataset("pictures", str(root), ("a", "b", "c"), tuple(replace(sample, split=None) for sample in samples))
    return split_dataset(loose, val_fraction=0.25, test_fraction=0.2)


def context_of(dataset: Dataset, classifier: Classifier, folder: Path, cache: Path) -> TrainingContext:
    return TrainingContext(
        dataset,
        task_named("multiclass"),
        build_augment("none", None, classifier.backbone.preprocess),
        RunDir(folder).create(),
        Compute("cpu", "float32", 1),
        identity={},
        store=Store(cache),
    )


def head_solved(dataset: Dataset, folder: Path, cache: Path) -> tuple[SolvedHead, Classifier, Recipe]:
    """A linear probe that has chosen its strength on val."""
    classifier = tiny_classifier()
    recipe = tiny_recipe(classifier, len(dataset.of("train")), hyperparameters={"views": 1})
    return solve(classifier, recipe, context_of(dataset, classifier, folder, cache)), classifier, recipe


def solve(classifier: Classifier, recipe: Recipe, context: TrainingContext) -> SolvedHead:
    return solve_head(embedding_prefix(classifier), classifier.backbone.preprocess, recipe, context)[0]


def test_a_refitted_probe_is_the_head_solved_on_all_images_with_the_chosen_strength(
    dataset: Dataset, tmp_path: Path, cache: Path
) -> None:
    chose, classifier, recipe = head_solved(dataset, tmp_path / "choose", cache)
    whole = with_val_as_train(dataset)
    pool = whole.of("train")
    assert len(pool) == len(dataset.of("train")) + len(dataset.of("val"))
    again = refit_recipe(recipe, len(pool), chose.l2)
    refitted = solve(classifier, again, context_of(whole, classifier, tmp_path / "refit", cache))
    assert refitted.chosen_by == "given"
    features = pooled_features(
        embedding_prefix(classifier), pool, Views(classifier.backbone.preprocess), FeatureContext(Store(cache))
    )
    trusted = solve_softmax_head(features, targets_of(pool), CLASSES, l2=chose.l2)
    np.testing.assert_allclose(refitted.weight, trusted.weight, rtol=0, atol=1e-6)
    np.testing.assert_allclose(refitted.bias, trusted.bias, rtol=0, atol=1e-6)
    assert np.abs(chose.weight - trusted.weight).max() > 1e-4, "the images of val have changed nothing"


@pytest.mark.parametrize(
    "method",
    [{"type": "full", "bn": "recalibrate"}, pytest.param({"type": "gradual", "bn": "train"}, marks=pytest.mark.slow)],
)
def test_a_run_that_is_told_what_another_chose_ends_with_its_bits(
    method: dict[str, Any], samples: list[Sample], tmp_path: Path
) -> None:
    given = {"method": method, "hyperparameters": EVERYTHING}
    fitted, classifier = train_tiny(RunDir(tmp_path / "first"), samples, given)
    again, other = train_tiny(RunDir(tmp_path / "second"), samples, given, decided=fitted.choices)
    assert again.n_steps == fitted.best_step
    kept, told = classifier.state_dict(), other.state_dict()
    assert all(torch.equal(kept[name], told[name]) for name in kept)
    assert not any("val/top1" in line["values"] for line in again.history), "it evaluates nothing"
    assert again.best == {}


@pytest.mark.parametrize("decided", [Choices(n_epochs=0), Choices(n_epochs=1, share=0.5, recalibrated=True)])
def test_whatever_was_chosen_can_be_done_again(decided: Choices, samples: list[Sample], tmp_path: Path) -> None:
    given = {"method": {"type": "full", "bn": "recalibrate"}, "hyperparameters": EVERYTHING}
    fitted, classifier = train_tiny(RunDir(tmp_path / "run"), samples, given, decided=decided)
    assert replace(fitted.choices, numerics=None) == decided
    assert fitted.n_steps == decided.n_epochs * 5
    assert ("recalibrated" in fitted.chosen, "interpolated" in fitted.chosen) == (decided.recalibrated, decided.share < 1)
    assert not classifier.training


def test_choices_survive_a_trip_through_json(samples: list[Sample], tmp_path: Path) -> None:
    given = {"method": {"type": "full", "bn": "recalibrate"}, "hyperparameters": EVERYTHING}
    choices = train_tiny(RunDir(tmp_path / "run"), samples, given)[0].choices
    assert choices.n_epochs >= 1
    assert choices.numerics is not None
    assert Choices.from_dict(json.loads(json.dumps(choices.to_dict()))) == choices


def test_the_schedule_stays_the_same_in_epochs() -> None:
    classifier = tiny_classifier()
    recipe = tiny_recipe(classifier, 20, method="gradual", hyperparameters={"n_epochs": 8, "batch_size": 5, "ema": True})
    longer = refit_recipe(recipe, 40, l2=0.25)
    assert (longer.n_epochs, longer.steps_per_epoch, longer.n_steps) == (8, 8, 64)
    assert longer.l2 == 0.25
    assert recipe.ema_half_life_steps is not None
    assert longer.ema_half_life_steps == 2 * recipe.ema_half_life_steps
    half, whole = [(phase.stage_lr, phase.decay, phase.trainable) for phase in recipe.phases], longer.phases
    assert half == [(phase.stage_lr, phase.decay, phase.trainable) for phase in whole]
