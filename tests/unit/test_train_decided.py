"""A model is fitted once more on train and val: what val chose is done again, and nothing is chosen any more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune.train.methods import Compute, Context, Trained, refit, solved_logits, train_classifier
from folders import path_of
from tiny_training import CLASSES, tiny_classifier, tiny_recipe, train_tiny, write_images

from finetune.data.augment import build_augment
from finetune.data.dataset import Dataset, Sample
from finetune.data.split import split_dataset
from finetune.features.rows import Resources, Views, pooled_features
from finetune.features.solve import solve_softmax_head
from finetune.model.classifier import Classifier
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store
from finetune.train.average import copy_state
from finetune.train.fit import Decided
from finetune.train.recipe import refit_recipe

EVERYTHING = {"n_epochs": 3, "batch_size": 6, "learning_rate": 0.01, "ema": True}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace that the tests share: the traced prefix and the features in it serve all of them."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _in_workspace(home: Path, monkeypatch: pytest.MonkeyPatch, one_torch_thread: None) -> None:
    monkeypatch.setenv("FINETUNE_HOME", str(home))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return write_images(tmp_path_factory.mktemp("images"), 36)


@pytest.fixture(scope="module")
def dataset(samples: list[Sample]) -> Dataset:
    root = path_of(samples[0]).parent
    loose = Dataset("pictures", str(root), ("a", "b", "c"), tuple(replace(sample, split=None) for sample in samples))
    return split_dataset(loose, val_fraction=0.25, test_fraction=0.2)


def context_of(dataset: Dataset, classifier: Classifier, run: RunDir) -> Context:
    augment = build_augment("none", None, classifier.backbone.preprocess)
    return Context(dataset, augment, run.create(), Compute("cpu", "float32", 1), {"spec": "a"}, Store(run.root.parent / "cache"))


def train_and_refit(dataset: Dataset, run: RunDir, **given: Any) -> tuple[Any, Trained, Trained]:
    classifier = tiny_classifier()
    start = copy_state(classifier)
    recipe = tiny_recipe(classifier, len(dataset.of("train")), **given)
    context = context_of(dataset, classifier, run)
    trained = train_classifier(classifier, recipe, context)
    classifier.load_state_dict(start)
    return classifier, trained, refit(classifier, trained, context)


def test_a_refitted_probe_is_the_probe_solved_on_all_images_with_the_chosen_strength(dataset: Dataset, tmp_path: Path) -> None:
    classifier, trained, refitted = train_and_refit(dataset, RunDir(tmp_path / "run"), hyperparameters={"views": 1})
    pool = tuple(sample for sample in dataset.samples if sample.split != "test")
    assert len(pool) > len(dataset.of("train"))
    features = pooled_features(classifier, pool, Views(classifier.backbone.preprocess), Resources(Store(tmp_path / "cache")))
    trusted = solve_softmax_head(features, np.array([sample.target for sample in pool]), CLASSES, l2=trained.l2)
    np.testing.assert_allclose(classifier.head.weight.detach().numpy(), trusted.weight, rtol=0, atol=1e-6)
    np.testing.assert_allclose(classifier.head.bias.detach().numpy(), trusted.bias, rtol=0, atol=1e-6)
    assert trained.probe is not None
    assert np.abs(trained.probe.weight - trusted.weight).max() > 1e-4, "the images of val have changed nothing"
    assert refitted.probe is trained.probe, "the evidence for the choice is what it was"
    assert "once more on train + val" in refitted.summary


def test_the_cached_answer_of_a_solved_head_is_that_of_the_whole_network(dataset: Dataset, tmp_path: Path) -> None:
    classifier, _, _ = train_and_refit(dataset, RunDir(tmp_path / "run"))
    images = np.stack([classifier.backbone.preprocess.load_file(path_of(sample)) for sample in dataset.of("test")])
    with torch.no_grad():
        trusted = classifier.eval()(classifier.normalise(torch.from_numpy(images))).numpy()
    context = context_of(dataset, classifier, RunDir(tmp_path / "run"))
    np.testing.assert_allclose(solved_logits(classifier, dataset.of("test"), context), trusted, atol=1e-4)


@pytest.mark.parametrize(
    "method",
    [{"type": "full", "bn": "recalibrate"}, pytest.param({"type": "gradual", "bn": "train"}, marks=pytest.mark.slow)],
)
def test_a_run_that_is_told_what_another_chose_ends_with_its_bits(
    method: dict[str, Any], samples: list[Sample], tmp_path: Path
) -> None:
    given = {"method": method, "hyperparameters": EVERYTHING}
    fitted, classifier = train_tiny(RunDir(tmp_path / "first"), samples, given)
    again, other = train_tiny(RunDir(tmp_path / "second"), samples, given, decided=fitted.decided)
    assert again.n_steps == fitted.best_step
    kept, told = classifier.state_dict(), other.state_dict()
    assert all(torch.equal(kept[name], told[name]) for name in kept)
    assert not any("val/top1" in line["values"] for line in again.history), "it evaluates nothing"
    assert again.best == {}


@pytest.mark.parametrize("decided", [Decided(0), Decided(1, share=0.5, recalibrated=True)])
def test_whatever_was_chosen_can_be_done_again(decided: Decided, samples: list[Sample], tmp_path: Path) -> None:
    given = {"method": {"type": "full", "bn": "recalibrate"}, "hyperparameters": EVERYTHING}
    fitted, classifier = train_tiny(RunDir(tmp_path / "run"), samples, given, decided=decided)
    assert fitted.decided == decided
    assert fitted.n_steps == decided.n_epochs * 5
    assert ("recalibrated" in fitted.chosen, "pulled" in fitted.chosen) == (decided.recalibrated, decided.share < 1)
    assert not classifier.training


@pytest.mark.parametrize("method", ["partial", "full"])  # steps on cached activations, and on images
def test_a_refit_takes_the_chosen_epochs_of_more_images(method: str, dataset: Dataset, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    given = {"method": {"type": method, "warm_head": False}, "hyperparameters": {"n_epochs": 2, "batch_size": 5}}
    _, trained, refitted = train_and_refit(dataset, run, **given)
    assert trained.fitted is not None
    chosen = trained.fitted.decided
    assert chosen.n_epochs >= 1
    pool = len(dataset.of("train")) + len(dataset.of("val"))
    (event,) = [line for line in read_lines(run.events) if line["kind"] == "refitted"]
    assert f"the {pool} images of train and val" in event["message"]
    steps = [line["step"] for line in read_lines(run.root / "refit" / "metrics.jsonl")]
    assert max(steps) == chosen.n_epochs * (pool // 5)
    assert refitted.fitted == trained.fitted


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
