"""Training on cached activations takes the course of training on the same views, computed anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import path_of
from tiny_training import MULTICLASS, class_means, targets_of, tiny_classifier, tiny_recipe, write_images

from finetune.data.augment import build_augment
from finetune.data.dataset import Sample
from finetune.data.loader import Batch, EvalLoader, TrainLoader, epoch_order
from finetune.events import Event
from finetune.features import prefix
from finetune.features.rows import FeatureContext, Views
from finetune.model.classifier import Classifier
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store
from finetune.training.fit import fit
from finetune.training.machine import Numerics
from finetune.training.replay import Activations, ForwardFrom, cached_activations, prepare_activation
from finetune.training.state import CheckpointSchedule, Fitted

pytestmark = pytest.mark.usefixtures("one_torch_thread")

N_TRAIN, N_VAL, BATCH_SIZE, SEED = 22, 6, 4, 3


@pytest.fixture(autouse=True)
def _torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares an export for each test; that ONNX Runtime agrees with torch is shown elsewhere."""
    monkeypatch.setattr(prefix, "_open_onnx", lambda module, images, plain, *_: plain)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return write_images(tmp_path_factory.mktemp("images"), N_TRAIN + N_VAL)


def views_of(classifier: Classifier, count: int) -> Views:
    preprocess = classifier.backbone.preprocess
    return Views(preprocess, build_augment("default", None, preprocess), count)


def activations_of(classifier: Classifier, stage: int, samples: list[Sample], cache: Path, count: int = 1) -> Activations:
    found = cached_activations(classifier, stage, samples, views_of(classifier, count), FeatureContext(Store(cache), threads=1))
    assert found is not None
    return found


def train_partial(
    run: RunDir, samples: list[Sample], cached: bool, dtype: torch.dtype | None = None
) -> tuple[Fitted, Classifier]:
    """The last two stages for four epochs, on three views of each image in turn."""
    train, val = samples[:N_TRAIN], samples[N_TRAIN:]
    classifier = tiny_classifier()
    class_means(classifier, train)
    given = {"n_epochs": 4, "batch_size": BATCH_SIZE, "learning_rate": 3e-2}
    recipe = tiny_recipe(classifier, N_TRAIN, seed=SEED, method={"type": "partial", "stages": 2}, hyperparameters=given)
    numerics = Numerics(threads=1)
    checkpointing = CheckpointSchedule({"spec": "a"})
    targets = {**MULTICLASS, "train_targets": targets_of(train), "val_targets": targets_of(val)}
    if cached:
        stage = min(recipe.trainable)
        of_train = activations_of(classifier, stage, train, run.root / "cache", count=3)
        of_val = activations_of(classifier, stage, val, run.root / "cache")
        assert of_train.rows.dtype == np.float16
        fitted = fit(
            classifier,
            recipe,
            of_train.train_batches(BATCH_SIZE, SEED),
            of_val.eval_batches(5),
            run,
            checkpointing,
            numerics=lambda: numerics,
            **targets,
            prepare=prepare_activation,
            forward=ForwardFrom(stage),
        )
        return fitted, classifier
    views = views_of(classifier, 3)

    def batches(epoch: int, start_step: int) -> Iterator[Batch]:
        order = epoch_order(N_TRAIN, SEED, epoch)[start_step * BATCH_SIZE :]
        for indices in np.split(order, range(BATCH_SIZE, len(order), BATCH_SIZE)):
            pixels = [views.pixels(path_of(train[i]).read_bytes(), [(int(i) + epoch) % 3])[0] for i in indices]
            yield Batch(np.stack(pixels), indices)

    val_loader = EvalLoader(val, classifier.backbone.preprocess)
    return fit(classifier, recipe, batches, val_loader, run, checkpointing, numerics=lambda: numerics, **targets), classifier


def losses(fitted: Fitted, name: str) -> np.ndarray:
    return np.array([line["values"][name] for line in fitted.history if name in line["values"]])


def test_training_on_the_cache_takes_the_course_of_training_without_it(tmp_path: Path, samples: list[Sample]) -> None:
    plain, plain_classifier = train_partial(RunDir(tmp_path / "plain").create(), samples, cached=False)
    cached, cached_classifier = train_partial(RunDir(tmp_path / "cached").create(), samples, cached=True)
    assert plain.n_steps == cached.n_steps == 24
    for name in ("train/loss", "val/loss"):
        assert len(losses(plain, name)) >= 3
        np.testing.assert_allclose(losses(cached, name), losses(plain, name), rtol=5e-3)
    assert np.ptp(losses(plain, "train/loss")) > 0.05  # it is a course
    begun = tiny_classifier().state_dict()
    moved = 0
    for name, tensor in plain_classifier.state_dict().items():
        torch.testing.assert_close(cached_classifier.state_dict()[name], tensor, rtol=2e-2, atol=2e-3)
        moved += not torch.equal(begun[name], tensor)
    assert moved > 5
    assert plain.frozen_before == cached.frozen_before == cached.frozen_after


@pytest.mark.parametrize("count", [1, 3])
def test_batches_come_in_the_order_of_the_loader_and_start_at_any_step(tmp_path: Path, samples: list[Sample], count: int) -> None:
    classifier = tiny_classifier()
    activations = activations_of(classifier, 2, samples[:N_TRAIN], tmp_path, count)
    batches = activations.train_batches(BATCH_SIZE, SEED)
    loader = TrainLoader(samples[:N_TRAIN], views_of(classifier, 1).augment, BATCH_SIZE, SEED, epoch=2)
    whole = list(batches(2, 0))
    assert [batch.indices.tolist() for batch in whole] == [batch.indices.tolist() for batch in loader]
    rest = list(batches(2, 4))
    assert len(whole) == 6
    assert len(rest) == 2
    for early, late in zip(whole[4:], rest, strict=True):
        np.testing.assert_array_equal(early.images, late.images)


def test_every_view_is_shown_once_in_as_many_epochs_as_there_are_views(tmp_path: Path, samples: list[Sample]) -> None:
    activations = activations_of(tiny_classifier(), 2, samples[:N_TRAIN], tmp_path, count=3)
    batches = activations.train_batches(BATCH_SIZE, SEED)
    shown = [
        {bytes(row) for batch in batches(epoch, 0) for i, row in zip(batch.indices, batch.images, strict=True) if i == 5}
        for epoch in range(3)
    ]
    assert len(set.union(*shown)) == 3


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit", "test_convnext"])
def test_logits_from_cached_activations_are_the_whole_network_s(tmp_path: Path, samples: list[Sample], architecture: str) -> None:
    classifier = tiny_classifier(architecture).eval()
    numerics = Numerics(threads=1)
    plain = EvalLoader(samples, classifier.backbone.preprocess, batch_size=7)
    for stage in (1, len(classifier.backbone.stages) - 1):
        activations = activations_of(classifier, stage, samples, tmp_path)
        forward = ForwardFrom(stage)
        seen = 0
        for cached, images in zip(activations.eval_batches(7), plain, strict=True):
            with torch.no_grad():
                logits = forward(classifier, prepare_activation(classifier, torch.from_numpy(cached.images), numerics))
                expected = classifier(classifier.normalise(torch.from_numpy(images.images)))
            torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-3)
            np.testing.assert_array_equal(cached.indices, images.indices)
            seen += len(cached.indices)
        assert seen == len(samples)


def test_one_forward_serves_copies_of_the_classifier(tmp_path: Path, samples: list[Sample]) -> None:
    first, second = tiny_classifier(seed=0).eval(), tiny_classifier(seed=1).eval()
    forward = ForwardFrom(2)
    activation = torch.randn(3, *first.backbone.stages[1].output_shape)
    with torch.no_grad():
        assert not torch.equal(forward(first, activation), forward(second, activation))
        assert torch.equal(forward(first, activation), ForwardFrom(2)(first, activation))


def test_activations_beyond_float16_are_kept_as_float32(tmp_path: Path, samples: list[Sample]) -> None:
    classifier = tiny_classifier().eval()
    last = classifier.backbone.stages[1]
    scaled = [name for name in last.parameters if name.endswith("weight")][-1]  # of its last batch norm
    dict(classifier.backbone.module.named_parameters())[scaled].data.mul_(1e7)
    events: list[Event] = []
    context = FeatureContext(Store(tmp_path), threads=1, event=events.append)
    activations = cached_activations(classifier, 2, samples, views_of(classifier, 1), context)
    assert activations is not None
    assert activations.rows.dtype == np.float32
    assert np.isfinite(next(iter(activations.eval_batches(28))).images).all()
    assert [event.kind for event in events if event.kind != "prefix_engine"] == ["cache_format"]


def test_without_room_there_are_no_activations_and_an_event_says_so(tmp_path: Path, samples: list[Sample]) -> None:
    classifier = tiny_classifier()
    events: list[Event] = []
    context = FeatureContext(Store(tmp_path, 1000), threads=1, event=events.append)
    assert cached_activations(classifier, 2, samples, views_of(classifier, 1), context) is None
    assert events[0].kind == "cache_full"
    assert events[0].message.startswith("the frozen part runs again in every epoch: 0.00 GB are needed")


def test_epochs_read_what_was_computed_once(tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = tiny_classifier()
    activations_of(classifier, 2, samples, tmp_path, count=2)
    monkeypatch.setattr(prefix.TorchEngine, "run", None)
    again = activations_of(replace_head(classifier), 2, samples, tmp_path, count=2)
    assert len(list(again.train_batches(4, 9)(0, 0))) == 7


def replace_head(classifier: Classifier) -> Classifier:
    return Classifier(classifier.backbone, 7)
