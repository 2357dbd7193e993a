"""A request resolved is a value: every auto decided with its reason, written down and read back, the same for the same facts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from folders import local_sample

from finetune.bundle.preprocess import Preprocess
from finetune.data.dataset import Dataset
from finetune.data.split import split_dataset
from finetune.model.facts import BackboneFacts, StageFacts
from finetune.runs.resolve import Resolved, resolve, resolve_compute
from finetune.spec import parse_spec
from finetune.training.compute import Compute

METHODS: tuple[Any, ...] = (
    "linear_probe",
    "partial",
    {"type": "partial", "train": ["layer1", "layer3"]},
    "full",
    {"type": "full", "warm_head": False, "bn": "train", "layer_decay": 0.5},
    "gradual",
    {"type": "gradual", "epochs_per_stage": 2, "bn": "recalibrate"},
)
BACKBONE = BackboneFacts(
    name="resnet",
    stages=tuple(StageFacts(i, name, 100 * (i + 1), (8, 4, 4)) for i, name in enumerate(["stem", "layer1", "layer2", "layer3"])),
    n_parameters=1000,
    n_features=16,
    has_batch_norm=True,
    resizable=True,
    weights={"source": "hub", "identifier": "resnet.a1", "sha256": "0" * 64, "license": "apache-2.0"},
    preprocess=Preprocess((224, 224), "crop", 0.875, "bicubic", (124, 116, 104), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
    cam_kind="linear",
    cam_reason="",
)
COMPUTE = Compute("cpu", "auto", 2)


def dataset_of(n: int = 90, size_px: tuple[int, int] = (300, 200)) -> Dataset:
    samples = tuple(
        local_sample(Path(f"{number}.jpg"), number % 3, sha256=f"{number:064x}", size_px=size_px) for number in range(n)
    )
    return split_dataset(Dataset("photos", "/photos", ("a", "b", "c"), samples, warnings=("odd",)))


def resolved(method: Any = "linear_probe", **given: Any) -> Resolved:
    spec = parse_spec({"training_file": "photos", "method": method, **given})
    return resolve(spec, dataset_of(), BACKBONE, COMPUTE)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}.{number}")
    else:
        yield path, value


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_it_survives_a_trip_through_json(method: Any) -> None:
    found = resolved(method, suffix="flowers", metadata={"who": "ann"}, hyperparameters={"mixup": 0.2})
    written = json.dumps(found.to_dict(), allow_nan=False)
    again = Resolved.from_dict(json.loads(written))
    assert again == found
    assert json.dumps(again.to_dict()) == written


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_nothing_is_left_at_auto_but_what_the_request_itself_says(method: Any) -> None:
    document = resolved(method).to_dict()
    del document["spec"]
    undecided = [path for path, value in leaves(document) if value == "auto"]
    # float32 or bfloat16 is measured when the steps begin; the run's first event says which
    assert undecided == [".compute.precision"]
    assert len(list(leaves(document["values"]))) >= 11


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_value_that_could_be_auto_has_a_reason(method: Any) -> None:
    found = resolved(method)
    asked = dict(leaves(found.spec.model_dump(mode="json")))
    autos = {path.removeprefix(".") for path, value in asked.items() if value == "auto"}
    decided = {path for path, value in found.values().items() if value is not None}
    assert [path for path in sorted(autos & decided) if not found.sources.get(path)] == []
    assert len(autos & decided) >= 9
    assert set(found.sources) <= {path.removeprefix(".") for path in asked} | {"method.layer_decay"}
    assert not [path for path in autos if found.sources.get(path) == "given"]


def test_what_was_given_stays_and_says_so() -> None:
    given = {"batch_size": 7, "n_epochs": 3, "learning_rate": 0.01, "weight_decay": 0.3, "ema": False, "views": 2, "l2": 0.5}
    found = resolved("full", hyperparameters=given, data={"resize": "squash"}, compute={"threads": 5})
    values = found.values()
    assert {key: values[f"hyperparameters.{key}"] for key in given} == given
    assert values["data.resize"] == "squash"
    assert {found.sources[f"hyperparameters.{key}"] for key in given} == {"given"}
    assert found.sources["data.resize"] == "given"


def test_equal_facts_give_an_equal_plan_and_only_facts_decide() -> None:
    assert resolved("full") == resolved("full")
    spec = parse_spec({"training_file": "photos", "method": "full"})
    small, large = (resolve(spec, dataset_of(n), BACKBONE, COMPUTE) for n in (60, 1200))
    assert small.recipe.batch_size < large.recipe.batch_size
    untrained = resolve(spec, dataset_of(), replace(BACKBONE, weights={**BACKBONE.weights, "source": "none"}), COMPUTE)
    assert untrained.recipe.peak_learning_rate > resolved("full").recipe.peak_learning_rate


def test_the_data_is_described_as_it_was_split() -> None:
    found = resolved(suffix=None)
    assert found.model_name == "photos"
    assert found.dataset.sizes == {"train": 71, "val": 8, "test": 11}
    assert found.dataset.digest == dataset_of().digest
    assert found.dataset.warnings == ("odd",)


def test_a_class_that_a_split_cannot_measure_is_told_once_before_training() -> None:
    whole = dataset_of()
    rare = [sample for sample in whole.samples if sample.target == 2]
    few = replace(whole, samples=tuple(s for s in whole.samples if s.target != 2 or s in (rare[0], rare[-1])))
    without = replace(few, samples=tuple(replace(s, split="train") if s.target == 2 else s for s in few.samples))
    said = (
        "odd",
        "val: no images of 1 class, which it cannot measure: c",
        "test: no images of 1 class, which it cannot measure: c",
    )
    found = resolve(parse_spec({"training_file": "photos"}), without, BACKBONE, COMPUTE)
    assert found.dataset.warnings[:3] == said
    assert [line.partition(":")[0] for line in found.dataset.warnings[3:]] == [
        "Classes with few images", "Classes of very different size",
    ]  # fmt: skip
    told = replace(without, warnings=said[:2])  # where a split is the user's own, listing the data says so already
    assert resolve(parse_spec({"training_file": "photos"}), told, BACKBONE, COMPUTE).dataset.warnings[:3] == said


def test_images_are_framed_by_their_shapes_unless_it_is_given() -> None:
    spec = parse_spec({"training_file": "photos"})
    long = resolve(spec, dataset_of(size_px=(900, 300)), BACKBONE, COMPUTE)
    assert long.preprocess.resize == "squash"
    assert "3.00 times as long as wide" in long.sources["data.resize"]
    assert long.backbone.preprocess.resize == "crop", "the backbone's own is left as it was"


def test_a_head_that_is_solved_on_one_view_says_that_it_augments_nothing() -> None:
    plain = resolved("linear_probe", hyperparameters={"views": 1})
    assert (plain.augments, plain.values()["augmentation.policy"]) == (False, "none")
    assert resolved("linear_probe", hyperparameters={"views": 2}).values()["augmentation.policy"] == "default"
    assert resolved("full", augmentation="light").values()["augmentation.policy"] == "light"
    listed = resolved("full", augmentation={"transforms": [{"HorizontalFlip": {"p": 0.5}}]})
    assert listed.values()["augmentation.policy"] == "as listed"


def test_a_run_that_is_decided_by_another_takes_its_choices_over() -> None:
    first = resolve(parse_spec({"training_file": "photos", "method": "full"}), dataset_of(300), BACKBONE, COMPUTE)
    whole = dataset_of(300)
    pooled = replace(whole, samples=tuple(replace(s, split="test" if s.split == "test" else "train") for s in whole.samples))
    again = resolve(first.spec, pooled, BACKBONE, COMPUTE, decided_by=first, l2=0.25)
    assert again.recipe.l2 == 0.25
    assert again.preprocess == first.preprocess
    assert [phase.n_epochs for phase in again.recipe.phases] == [phase.n_epochs for phase in first.recipe.phases]
    assert again.recipe.n_steps > first.recipe.n_steps, "more images in as many epochs"
    assert Resolved.from_dict(json.loads(json.dumps(again.to_dict()))) == again


def test_threads_are_the_cores_unless_they_are_given() -> None:
    spec = parse_spec({"training_file": "photos"})
    assert resolve_compute(spec, "cpu", 6) == Compute("cpu", "auto", 6)
    given = parse_spec({"training_file": "photos", "compute": {"threads": 3, "precision": "float32"}})
    assert resolve_compute(given, "cpu", 6) == Compute("cpu", "float32", 3)


@pytest.mark.parametrize(("asked", "said"), [("", False), ("2", False), ("1", True)])
def test_a_number_of_threads_that_has_no_effect_is_said(asked: str, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    why = resolve(parse_spec({"training_file": "photos"}), dataset_of(), BACKBONE, COMPUTE).sources["compute.threads"]
    assert ("compute.threads sets it, OMP_NUM_THREADS=1 does not" in why) == said
