"""Frozen features: equal to torch's, computed once, found again exactly when they would be equal, and never made up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import local_sample, path_of
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from tiny_training import tiny_classifier, write_images

from finetune.data.augment import Augment, build_augment
from finetune.data.dataset import Sample
from finetune.data.loader import EvalLoader
from finetune.errors import DataError, DiskFull, TrainingError
from finetune.events import CacheFull, Event
from finetune.features import prefix
from finetune.features.cache import ShardWriter
from finetune.features.plan import plan_prefix
from finetune.features.prefix import embedding_prefix
from finetune.features.rows import FeatureContext, Views, pooled_features
from finetune.model.classifier import Classifier
from finetune.progress import Progress
from finetune.runtime.seconds import Seconds
from finetune.storage.store import Store

pytestmark = pytest.mark.usefixtures("one_torch_thread")

N_IMAGES = 24


class Watcher:
    """What the computation of features told its caller."""

    def __init__(self) -> None:
        self.updates: list[Progress] = []
        self.events: list[Event] = []

    def context(self, cache: Path, budget_bytes: int | None = None, **given: object) -> FeatureContext:
        return FeatureContext(
            Store(cache, budget_bytes), threads=2, progress=self.updates.append, event=self.events.append, **given
        )

    @property
    def n_computed(self) -> int:
        return self.updates[-1].done if self.updates else 0


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return write_images(tmp_path_factory.mktemp("images"), N_IMAGES)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return tiny_classifier().eval()


@pytest.fixture(scope="module")
def views(classifier: Classifier) -> Views:
    return Views(classifier.backbone.preprocess)


@pytest.fixture(scope="module")
def augment(classifier: Classifier) -> Augment:
    return build_augment("default", None, classifier.backbone.preprocess)


@pytest.fixture(scope="module")
def graph(classifier: Classifier) -> bytes:
    return prefix.export_prefix(prefix.PixelPrefix(classifier, len(classifier.backbone.stages)))


@pytest.fixture(scope="module")
def filled(
    tmp_path_factory: pytest.TempPathFactory, classifier: Classifier, samples: list[Sample], views: Views, graph: bytes
) -> Path:
    """A cache that holds the features of all samples."""
    cache = tmp_path_factory.mktemp("cache")
    pooled_features(embedding_prefix(classifier, lambda: graph), samples, views, Watcher().context(cache))
    return cache


@pytest.fixture
def cache(filled: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(filled, tmp_path / "cache"))


def expected(classifier: Classifier, samples: list[Sample]) -> np.ndarray:
    """The same by eager PyTorch, over the loader that evaluation uses."""
    with torch.no_grad():
        batches = [
            classifier.embed(classifier.normalise(torch.from_numpy(batch.images)))
            for batch in EvalLoader(samples, classifier.backbone.preprocess, batch_size=5)
        ]
    return torch.cat(batches).numpy()


def spent_on(
    classifier: Classifier, graph: bytes, samples: list[Sample], views: Views, cache: Path, budget_bytes: int | None = None
) -> Seconds:
    """What features are said to take."""
    spent: list[Seconds] = []
    context = Watcher().context(cache, budget_bytes, spent=spent.append)
    pooled_features(embedding_prefix(classifier, lambda: graph), samples, views, context)
    (seconds,) = spent
    return seconds


def test_features_that_are_found_cost_what_they_took_when_they_were_computed(
    tmp_path: Path, classifier: Classifier, samples: list[Sample], views: Views, augment: Augment, graph: bytes
) -> None:
    several = replace(views, augment=augment, count=3)
    for name, wanted in (("one view", views), ("several views", several)):
        computed = spent_on(classifier, graph, samples, wanted, tmp_path / name)
        assert computed.wall > 0
        assert computed.cpu > 0
        found = spent_on(classifier, graph, samples, wanted, tmp_path / name)
        assert (found.wall, found.cpu) == pytest.approx((computed.wall, computed.cpu))
        half = spent_on(classifier, graph, samples[: N_IMAGES // 2], wanted, tmp_path / name)
        assert (half.wall, half.cpu) == pytest.approx((computed.wall / 2, computed.cpu / 2))


def test_features_that_are_partly_found_cost_both_parts(
    tmp_path: Path, classifier: Classifier, samples: list[Sample], views: Views, graph: bytes
) -> None:
    half = spent_on(classifier, graph, samples[:12], views, tmp_path / "cache")
    whole = spent_on(classifier, graph, samples, views, tmp_path / "cache")
    assert whole.wall > half.wall
    again = spent_on(classifier, graph, samples, views, tmp_path / "cache")
    assert (again.wall, again.cpu) == pytest.approx((whole.wall, whole.cpu))


def test_features_that_are_not_kept_cost_something_too(
    tmp_path: Path, classifier: Classifier, samples: list[Sample], views: Views, graph: bytes
) -> None:
    assert spent_on(classifier, graph, samples, views, tmp_path / "cache", budget_bytes=10).cpu > 0


def must_not_run(*_: object) -> object:
    raise AssertionError("this should have come from the cache")


def test_features_are_what_torch_computes_on_the_images_that_evaluation_sees(
    tmp_path: Path, classifier: Classifier, samples: list[Sample], views: Views, graph: bytes
) -> None:
    watcher = Watcher()
    features = pooled_features(embedding_prefix(classifier, lambda: graph), samples, views, watcher.context(tmp_path))
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected(classifier, samples), rtol=1e-3, atol=1e-5)
    assert watcher.n_computed == N_IMAGES
    assert watcher.updates[-1].total == N_IMAGES
    assert watcher.updates[-1].values["images_per_second"] > 0
    assert not watcher.events


def test_what_was_computed_is_read_back_bit_for_bit_without_decoding_or_running_anything(
    tmp_path: Path, classifier: Classifier, samples: list[Sample], views: Views, graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pooled_features(embedding_prefix(classifier, lambda: graph), samples, views, Watcher().context(tmp_path))
    monkeypatch.setattr("finetune.features.prefix.open_engine", must_not_run)
    monkeypatch.setattr(Views, "pixels", must_not_run)
    again = pooled_features(embedding_prefix(classifier), samples, views, Watcher().context(tmp_path))
    assert again.tobytes() == first.tobytes()


def test_another_split_order_head_or_labels_find_the_same_rows(
    cache: Path, classifier: Classifier, samples: list[Sample], views: Views
) -> None:
    watcher = Watcher()
    chosen = [replace(sample, target=0, split="val") for sample in samples[::-2]]
    other_head = tiny_classifier()
    other_head.head.weight.data.normal_()
    features = pooled_features(embedding_prefix(other_head), chosen, views, watcher.context(cache))
    assert watcher.n_computed == 0
    np.testing.assert_allclose(features, expected(classifier, samples)[::-2], rtol=1e-3, atol=1e-5)


def test_a_copied_file_is_found_by_its_bytes_and_only_new_images_are_computed(
    cache: Path, tmp_path: Path, classifier: Classifier, samples: list[Sample], views: Views
) -> None:
    new = write_images(tmp_path / "grown", N_IMAGES + 3)  # the first are the same pictures at other paths
    watcher = Watcher()
    features = pooled_features(embedding_prefix(classifier), new, views, watcher.context(cache))
    assert watcher.n_computed == 3
    np.testing.assert_allclose(features, expected(classifier, new), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("change", ["weight", "statistics", "resize", "mean", "pooling"])
def test_anything_that_changes_the_features_computes_them_anew(
    cache: Path, samples: list[Sample], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "_open_onnx", lambda module, images, plain, *_: plain)  # spares an export for each
    changed = tiny_classifier().eval()
    backbone = changed.backbone
    if change == "weight":
        next(backbone.module.parameters()).data.view(-1)[0] += 1e-3
    if change == "statistics":
        next(buffer for name, buffer in backbone.module.named_buffers() if name.endswith("running_var")).mul_(1.01)
    if change == "resize":
        backbone.preprocess = replace(backbone.preprocess, resize="squash")
    if change == "mean":
        backbone.preprocess = replace(backbone.preprocess, mean=(0.4, 0.5, 0.6))
        changed = Classifier(backbone, 3).eval()
    if change == "pooling":
        changed = Classifier(backbone, 3, pooling="gem").eval()
    watcher = Watcher()
    features = pooled_features(embedding_prefix(changed), samples[:4], Views(backbone.preprocess), watcher.context(cache))
    assert watcher.n_computed == 4
    np.testing.assert_allclose(features, expected(changed, samples[:4]), rtol=1e-3, atol=1e-5)


def test_view_0_is_the_evaluated_one_and_the_others_depend_on_image_and_number_alone(
    cache: Path, classifier: Classifier, samples: list[Sample], views: Views, augment: Augment
) -> None:
    three = replace(views, augment=augment, count=3)
    watcher = Watcher()
    features = pooled_features(embedding_prefix(classifier), samples[:6], three, watcher.context(cache))
    assert features.shape == (6, 3, classifier.head.in_features)
    assert watcher.n_computed == 12  # view 0 was there
    np.testing.assert_allclose(features[:, 0], expected(classifier, samples[:6]), rtol=1e-3, atol=1e-5)
    assert not np.allclose(features[:, 1], features[:, 0], rtol=1e-2)
    assert not np.allclose(features[:, 2], features[:, 1], rtol=1e-2)
    watcher = Watcher()
    reordered = pooled_features(embedding_prefix(classifier), samples[5::-1], replace(three, count=2), watcher.context(cache))
    assert watcher.n_computed == 0
    np.testing.assert_array_equal(reordered, features[::-1, :2])


def test_another_augmentation_keeps_view_0_and_computes_the_rest(
    cache: Path, classifier: Classifier, samples: list[Sample], views: Views, augment: Augment
) -> None:
    light = build_augment("light", None, classifier.backbone.preprocess)
    pooled_features(embedding_prefix(classifier), samples[:4], replace(views, augment=augment, count=2), Watcher().context(cache))
    watcher = Watcher()
    pooled_features(embedding_prefix(classifier), samples[:4], replace(views, augment=light, count=2), watcher.context(cache))
    assert watcher.n_computed == 4


def test_undecodable_images_are_all_named_and_the_others_are_kept(
    cache: Path, tmp_path: Path, classifier: Classifier, views: Views
) -> None:
    samples = write_images(tmp_path / "images", N_IMAGES + 6)
    for sample in samples[-2:]:
        path_of(sample).write_bytes(b"not an image, but the right length of text")
    with pytest.raises(DataError, match="2 of 30 images") as caught:
        pooled_features(embedding_prefix(classifier), samples, views, Watcher().context(cache))
    assert {problem.where for problem in caught.value.problems} == {str(path_of(sample)) for sample in samples[-2:]}
    watcher = Watcher()
    pooled_features(embedding_prefix(classifier), samples[:-2], views, watcher.context(cache))
    assert watcher.n_computed == 0


def test_a_missing_file_is_named_before_anything_is_computed(
    cache: Path, classifier: Classifier, samples: list[Sample], views: Views
) -> None:
    gone = local_sample(Path("/nowhere/shirt.jpg"), 0, None)
    with pytest.raises(DataError, match="1 of 25 files") as caught:
        pooled_features(embedding_prefix(classifier), [*samples, gone], views, Watcher().context(cache))
    assert "/nowhere/shirt.jpg" in str(caught.value)


def test_where_the_cache_has_no_room_features_are_computed_and_an_event_says_so(
    tmp_path: Path, classifier: Classifier, samples: list[Sample], views: Views, graph: bytes
) -> None:
    watcher = Watcher()
    features = pooled_features(
        embedding_prefix(classifier, lambda: graph), samples, views, watcher.context(tmp_path, budget_bytes=1000)
    )
    np.testing.assert_allclose(features, expected(classifier, samples), rtol=1e-3, atol=1e-5)
    assert [event.kind for event in watcher.events] == ["cache_full"]
    assert "may hold 0.00 GB" in watcher.events[0].message
    assert not list(tmp_path.rglob("*.shard"))


def test_a_disk_that_fills_up_costs_the_cache_and_not_the_run(
    tmp_path: Path, classifier: Classifier, samples: list[Sample], views: Views, graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fills_up(*_: object) -> None:
        raise DiskFull("the disk is full")

    monkeypatch.setattr(ShardWriter, "flush", fills_up)
    watcher = Watcher()
    features = pooled_features(embedding_prefix(classifier, lambda: graph), samples, views, watcher.context(tmp_path))
    np.testing.assert_allclose(features, expected(classifier, samples), rtol=1e-3, atol=1e-5)
    assert watcher.events == [CacheFull("the features are not kept for later runs: the disk is full")]


def refuse(*_: object) -> object:
    raise ort_errors.NotImplemented("no kernel for Fancy(1)\nand a long trace")


def twice_as_long(self: prefix.OnnxEngine, images: np.ndarray) -> np.ndarray:
    rows: np.ndarray = 2 * self.session.run(None, {"images": images})[0]
    return rows


@pytest.mark.parametrize(
    ("target", "replacement", "reason"),
    [("open_session", refuse, "no kernel for Fancy"), ("OnnxEngine.run", twice_as_long, "cosine of 0.8")],
    ids=["cannot run", "differs"],
)
def test_an_engine_that_is_not_torch_is_replaced_by_torch_and_stays_so(
    tmp_path: Path,
    classifier: Classifier,
    samples: list[Sample],
    views: Views,
    graph: bytes,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    replacement: Callable[..., object],
    reason: str,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(f"finetune.features.prefix.{target}", replacement)
        watcher = Watcher()
        features = pooled_features(embedding_prefix(classifier, lambda: graph), samples[:8], views, watcher.context(tmp_path))
    np.testing.assert_allclose(features, expected(classifier, samples[:8]), rtol=1e-6, atol=1e-6)
    assert [event.kind for event in watcher.events] == ["prefix_engine"]
    assert reason in watcher.events[0].message
    watcher = Watcher()
    pooled_features(embedding_prefix(classifier, lambda: graph), samples[:10], views, watcher.context(tmp_path))
    assert watcher.n_computed == 2  # found under torch's name, and ONNX Runtime was not tried again
    assert reason in watcher.events[0].message


def test_a_damaged_graph_on_disk_is_exported_again(
    cache: Path, tmp_path: Path, classifier: Classifier, views: Views, graph: bytes
) -> None:
    (stored,) = cache.rglob("prefix.onnx")
    stored.write_bytes(stored.read_bytes()[:-100])
    more = write_images(tmp_path / "more", N_IMAGES + 2)
    features = pooled_features(embedding_prefix(classifier, lambda: graph), more, views, Watcher().context(cache))
    np.testing.assert_allclose(features, expected(classifier, more), rtol=1e-3, atol=1e-5)


def test_a_graph_that_another_process_deletes_at_this_moment_is_exported_again(
    cache: Path, tmp_path: Path, classifier: Classifier, views: Views, graph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_json, deleted = prefix.read_json, []

    def meanwhile(path: Path) -> Any:
        deleted.append(path.name)
        path.unlink()
        return read_json(path)

    monkeypatch.setattr(prefix, "read_json", meanwhile)
    more = write_images(tmp_path / "more", N_IMAGES + 2)
    features = pooled_features(embedding_prefix(classifier, lambda: graph), more, views, Watcher().context(cache))
    np.testing.assert_allclose(features, expected(classifier, more), rtol=1e-3, atol=1e-5)
    assert deleted == ["engine.json"]


def test_runs_at_the_same_time_share_a_cache(
    tmp_path: Path, classifier: Classifier, samples: list[Sample], views: Views, graph: bytes
) -> None:
    def run(part: list[Sample]) -> np.ndarray:
        return pooled_features(embedding_prefix(classifier, lambda: graph), part, views, Watcher().context(tmp_path))

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(run, [samples[:16], samples[8:], samples]))
    whole = expected(classifier, samples)
    for features, part in zip(results, [whole[:16], whole[8:], whole], strict=True):
        np.testing.assert_allclose(features, part, rtol=1e-3, atol=1e-5)
    watcher = Watcher()
    pooled_features(embedding_prefix(classifier), samples, views, watcher.context(tmp_path))
    assert watcher.n_computed == 0


def test_values_that_are_not_finite_stop_the_run(tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "_open_onnx", lambda module, images, plain, *_: plain)
    broken = tiny_classifier().eval()
    next(broken.backbone.module.parameters()).data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        pooled_features(embedding_prefix(broken), samples, Views(broken.backbone.preprocess), Watcher().context(tmp_path))


def test_the_classifier_is_left_as_it_was(tmp_path: Path, samples: list[Sample], graph: bytes) -> None:
    classifier = tiny_classifier()
    classifier.train()
    modes = [module.training for module in classifier.modules()]
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    seen = Views(classifier.backbone.preprocess)
    pooled_features(embedding_prefix(classifier, lambda: graph), samples[:8], seen, Watcher().context(tmp_path))
    assert [module.training for module in classifier.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())
    assert all(parameter.requires_grad for parameter in classifier.parameters())


def test_more_views_than_one_need_an_augmentation(views: Views) -> None:
    with pytest.raises(ValueError, match="needs an augmentation"):
        replace(views, count=2)


def test_no_images_give_no_rows(tmp_path: Path, classifier: Classifier, views: Views) -> None:
    assert pooled_features(embedding_prefix(classifier), [], views, Watcher().context(tmp_path)).shape == (
        0,
        classifier.head.in_features,
    )


def test_the_plan_counts_rows_and_bytes_and_measures_the_time(
    cache: Path, tmp_path: Path, classifier: Classifier, samples: list[Sample], views: Views
) -> None:
    n_stages = len(classifier.backbone.stages)
    plan = plan_prefix(classifier, n_stages, samples[:20], samples[20:], views, Watcher().context(cache))
    assert (plan.stage, plan.n_rows, plan.n_missing, plan.seconds) == (n_stages, N_IMAGES, 0, 0.0)
    assert plan.n_bytes >= N_IMAGES * classifier.head.in_features * 4
    assert "all in the cache" in str(plan)
    new = write_images(tmp_path / "more", N_IMAGES + 10)
    plan = plan_prefix(classifier, n_stages, new, [], views, Watcher().context(cache))
    assert plan.n_missing == 10
    assert plan.rows_per_second is not None
    assert plan.seconds == pytest.approx(10 / plan.rows_per_second)
    assert "10 still to compute with onnxruntime" in str(plan)


def test_the_plan_cuts_as_deep_as_the_freeze_and_the_room_allow(
    tmp_path: Path, classifier: Classifier, samples: list[Sample], views: Views, augment: Augment
) -> None:
    stages = classifier.backbone.stages
    four = replace(views, augment=augment, count=4)

    def plan(first_trainable: int, budget_bytes: int) -> tuple[int | None, int, str]:
        context = Watcher().context(tmp_path, budget_bytes=budget_bytes)
        made = plan_prefix(classifier, first_trainable, samples, [], four, context, measure=False)
        return made.stage, made.views, made.reason

    sizes = {stage: 2 * int(np.prod(stages[stage - 1].output_shape)) + 32 for stage in range(1, len(stages))}
    top = len(stages) - 1
    smallest = min(range(1, len(stages)), key=lambda stage: sizes[stage])
    assert plan(top, 10**9) == (top, 4, "")
    assert plan(1, 10**9) == (1, 4, "")
    assert plan(top, 2 * N_IMAGES * sizes[smallest]) == (smallest, 2, "4 views do not fit the cache")
    assert plan(top, 100) == (None, 4, "no cut fits into the cache")
    assert plan(0, 10**9) == (None, 4, "the first stage trains")


def test_an_engine_for_one_input_size_is_not_taken_for_another(
    cache: Path, classifier: Classifier, samples: list[Sample]
) -> None:
    """Only the graph knows the size: the same weights at 96 px must not find the one for 64 px in the cache."""
    preprocess = replace(classifier.backbone.preprocess, input_size_px=(96, 96))
    larger = tiny_classifier().eval()
    larger.backbone.preprocess = preprocess
    assert plan_prefix(
        larger, len(larger.backbone.stages), samples, [], Views(preprocess), FeatureContext(Store(cache), threads=1)
    ).seconds
    assert np.allclose(
        pooled_features(embedding_prefix(larger), samples, Views(preprocess), FeatureContext(Store(cache), threads=1)),
        expected(larger, samples),
        atol=1e-5,
    )
