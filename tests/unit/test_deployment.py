"""What the server answers with changes by promotion alone, and a promotion is checked first and written down."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import CLASSES, write_tiny_bundle

from finetune.bundle.access import Access
from finetune.bundle.deployment import Deployment, Share, deploy, read_deployment, roll_back
from finetune.bundle.predictor import Seen
from finetune.bundle.registry import Registry
from finetune.errors import Conflict, NotFound
from finetune.evaluation import predictions as tables
from finetune.evaluation.predictions import Predictions, digests_as_rows
from finetune.promotion import PromotionRefused, promote, promote_to_default


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_tiny_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models")


def means(registry: Registry) -> str:
    default = registry.default()
    return f"{default.name}@{default.version}"


def test_the_first_model_becomes_the_default_and_nothing_that_is_registered_later_does(registry: Registry, bundle: Path) -> None:
    registry.register(bundle, "trees")
    assert read_deployment(registry) == Deployment("trees@champion")
    for name in ("trees", "insects", "insects", "ants"):
        registry.register(bundle, name)
        assert means(registry) == "trees@1"


def test_a_default_changes_by_promotion_and_goes_back(registry: Registry, bundle: Path) -> None:
    for name in ("trees", "trees", "insects"):
        registry.register(bundle, name)
    registry.set_alias("trees", "champion", "2")
    assert means(registry) == "trees@2"
    deploy(registry, Deployment("insects@1"), by="ann")
    assert means(registry) == "insects@1"
    assert roll_back(registry, by="ann") == Deployment("trees@champion")
    assert roll_back(registry, by="ann") == Deployment("insects@1")
    lines = [json.loads(line) for line in (registry.root / "default.jsonl").read_text().splitlines()]
    assert [(line["by"], line["deployment"]["reference"]) for line in lines] == [
        ("first registration", "trees@champion"),
        *[("ann", reference) for reference in ("insects@1", "trees@champion", "insects@1")],
    ]


def test_there_is_nothing_to_go_back_to_before_a_second_deployment(registry: Registry, bundle: Path) -> None:
    registry.register(bundle, "trees")
    with pytest.raises(Conflict, match="nothing else has been the default"):
        roll_back(registry)


@pytest.mark.parametrize("part", ["canary", "shadow"])
def test_a_deployment_does_not_come_back_with_a_share_that_was_deleted(part: str, registry: Registry, bundle: Path) -> None:
    for name in ("trees", "insects", "ants"):
        registry.register(bundle, name)
    deploy(registry, Deployment("insects@1", **{part: Share("ants@1", 10.0)}))
    deploy(registry, Deployment("trees@1"))
    registry.delete("ants", force=True)
    with pytest.raises(Conflict, match=f"had the {part} ants@1, which was deleted. Deploy insects@1 without it"):
        roll_back(registry)
    assert read_deployment(registry) == Deployment("trees@1")


def test_what_does_not_exist_is_not_deployed(registry: Registry, bundle: Path) -> None:
    registry.register(bundle, "trees")
    for deployment in (Deployment("trees@9"), Deployment("ferns"), Deployment("trees", canary=Share("ferns", 5.0))):
        with pytest.raises(NotFound):
            deploy(registry, deployment)
    assert means(registry) == "trees@1"


def test_models_of_a_folder_filled_by_hand_need_a_choice_when_there_are_several(registry: Registry, bundle: Path) -> None:
    write_tiny_bundle(registry.root / "trees" / "1")
    assert means(registry) == "trees@1"
    registry.register(bundle, "insects")  # there was one model without a choice, and it goes on answering
    assert means(registry) == "trees@1"
    (registry.root / "default.json").unlink()
    with pytest.raises(NotFound, match=r"several models \(insects, trees\).* --default"):
        registry.default()


def test_when_the_default_is_gone_and_nothing_else_is_left_the_next_first_model_becomes_it(
    registry: Registry, bundle: Path
) -> None:
    registry.register(bundle, "trees")
    registry.delete("trees", force=True)
    with pytest.raises(NotFound):
        registry.default()
    registry.register(bundle, "insects")
    assert means(registry) == "insects@1"


@pytest.mark.parametrize("damage", ["", "[1]", "{}", '{"reference": 3}'])
def test_a_damaged_default_is_read_from_the_journal(registry: Registry, bundle: Path, damage: str) -> None:
    registry.register(bundle, "trees")
    registry.register(bundle, "insects")
    (registry.root / "default.json").write_text(damage)
    assert means(registry) == "trees@1"


# ---- conditions --------------------------------------------------------------------------------------------------------------


def test_a_version_that_does_not_reach_a_minimum_is_refused_unless_forced(registry: Registry, bundle: Path) -> None:
    for _ in range(2):
        registry.register(bundle, "trees")
    with pytest.raises(PromotionRefused, match=r"val/top1: is 0.7500, at least 0.9 is required"):
        promote(registry, "trees", "2", minimum={"val/top1": 0.9}, by="ann")
    with pytest.raises(PromotionRefused, match=r"set force \(in a terminal: --force\)"):
        promote(registry, "trees", "2", minimum={"val/top1": 0.9}, by="ann")
    with pytest.raises(PromotionRefused, match=r"test/top1: this version has no such metric; it has val/top1"):
        promote(registry, "trees", "2", minimum={"test/top1": 0.1}, by="ann")
    assert registry.resolve("trees").version == "1"
    promote(registry, "trees", "2", minimum={"val/top1": 0.9}, force=True, by="ann")
    assert registry.resolve("trees").version == "2"
    last = json.loads((registry.root / "trees" / "aliases.jsonl").read_text().splitlines()[-1])
    assert (last["by"], last["forced"], last["version"]) == ("ann", True, "2")
    assert {check["name"]: check["passed"] for check in last["checks"]} == {
        "loads": True, "parity": True, "val/top1": False, "classes": True, "not_worse": True,
    }  # fmt: skip


def test_a_version_with_other_classes_is_refused_unless_forced(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    registry.register(bundle, "trees")
    write_tiny_bundle(tmp_path / "other", classes=(*CLASSES[:-1], "oak"))
    registry.register(tmp_path / "other", "trees")
    with pytest.raises(PromotionRefused, match="other classes than version 1: without elm and with the new oak"):
        promote(registry, "trees", "2", by="ann")
    with pytest.raises(PromotionRefused, match="other classes"):
        promote_to_default(registry, Deployment("trees@2"), by="ann")
    promote_to_default(registry, Deployment("trees@2"), force=True, by="ann")
    assert means(registry) == "trees@2"


def test_a_version_whose_export_was_not_exact_is_refused_unless_forced(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    registry.register(bundle, "trees")
    measured = {"max_prob_difference": 0.1, "max_prob_difference_from_bytes": 0.0, "tolerances": {"prob": 1e-3}}
    write_tiny_bundle(tmp_path / "inexact", parity=measured)
    registry.register(tmp_path / "inexact", "trees")
    with pytest.raises(PromotionRefused, match=r"parity: probabilities of ONNX and torch differ by 0.1"):
        promote(registry, "trees", "2", by="ann")


def answers_of(path: Path, right: int, *, of: int = 100, first: int = 0, classes: tuple[str, ...] = CLASSES) -> Path:
    """The table of a model that is right on the first `right` of the images `first`, `first` + 1 …"""
    targets = np.arange(of) % 5
    says = np.where(np.arange(of) < right, targets, (targets + 1) % 5)
    digests = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(first, first + of)]
    order = [classes.index(name) for name in CLASSES]
    logits = np.zeros((of, 5), np.float32)
    logits[np.arange(of), np.array(order)[says]] = 1.0
    ids = tuple(f"{number}.png" for number in range(of))
    labels = np.array(order)[targets]
    tables.write(path, Predictions("test", "multiclass", classes, ids, digests_as_rows(digests), labels, logits))
    return path


def register_two(registry: Registry, bundle: Path, *predictions: Path | None) -> None:
    for table in predictions:
        registry.register(bundle, "trees", predictions=table)


def checked(registry: Registry) -> str:
    """What the last promotion found out about the answers to the same images."""
    last = json.loads((registry.root / "trees" / "aliases.jsonl").read_text().splitlines()[-1])
    (found,) = [check["detail"] for check in last["checks"] if check["name"] == "not_worse"]
    return str(found)


def test_a_version_that_is_worse_on_the_same_images_is_refused_unless_forced(
    registry: Registry, bundle: Path, tmp_path: Path
) -> None:
    register_two(registry, bundle, answers_of(tmp_path / "good.npz", 95), answers_of(tmp_path / "bad.npz", 80))
    said = r"not_worse: worse than version 1: top1 0\.800 on the same 100 test images where version 1 has 0\.950 \(p = 3\.1e-05"
    for promoting in (
        lambda force: promote(registry, "trees", "2", force=force, by="ann"),
        lambda force: promote_to_default(registry, Deployment("trees@2"), force=force, by="ann"),
    ):
        with pytest.raises(PromotionRefused, match=said):
            promoting(False)
    assert means(registry) == "trees@1"
    promote(registry, "trees", "2", force=True, by="ann")
    assert checked(registry).startswith("worse than version 1: ")
    promote(registry, "trees", "1", by="ann")
    assert checked(registry).startswith("top1 0.950 on the same 100 test images where version 2 has 0.800")


def test_a_difference_that_may_be_chance_does_not_hold_a_version_back(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    register_two(registry, bundle, answers_of(tmp_path / "a.npz", 95), answers_of(tmp_path / "b.npz", 91))
    promote(registry, "trees", "2", by="ann")
    assert checked(registry) == ("top1 0.910 on the same 100 test images where version 1 has 0.950 (p = 0.062, McNemar, mid-p)")


def test_images_are_paired_by_their_bytes_and_classes_by_name(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    """The second version answered other images too, and its classes are in another order."""
    write_tiny_bundle(tmp_path / "turned", classes=CLASSES[::-1])
    registry.register(bundle, "trees", predictions=answers_of(tmp_path / "a.npz", 100))
    shifted = answers_of(tmp_path / "b.npz", 60, first=50, classes=CLASSES[::-1])
    registry.register(tmp_path / "turned", "trees", predictions=shifted)
    promote(registry, "trees", "2", by="ann")
    assert checked(registry).startswith("top1 1.000 on the same 50 test images where version 1 has 1.000 (p = 1,")


def test_images_that_one_of_the_versions_has_seen_do_not_count(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    """What it answers wrongly, the first version was trained on."""
    digests = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(80, 100)]
    write_tiny_bundle(tmp_path / "knowing", seen=Seen.of(digests[:10], digests[10:]))
    registry.register(tmp_path / "knowing", "trees", predictions=answers_of(tmp_path / "a.npz", 100))
    registry.register(bundle, "trees", predictions=answers_of(tmp_path / "b.npz", 80))
    promote(registry, "trees", "2", by="ann")
    assert checked(registry).startswith("top1 1.000 on the same 80 test images where version 1 has 1.000")


def test_what_cannot_be_compared_is_said_and_not_held_against_a_version(registry: Registry, bundle: Path, tmp_path: Path) -> None:
    tables_given = (answers_of(tmp_path / "a.npz", 95), None, answers_of(tmp_path / "c.npz", 0, first=100))
    register_two(registry, bundle, *tables_given)
    promote(registry, "trees", "2", by="ann")
    assert checked(registry) == "not compared: version 2 was evaluated on no test images"
    promote(registry, "trees", "1", by="ann")
    promote(registry, "trees", "3", by="ann")
    assert checked(registry) == "not compared: no test image in common with version 1 that neither has seen"
    registry.predictions_of(registry.resolve("trees", "1")).write_bytes(b"not a table")
    promote(registry, "trees", "1", by="ann")
    assert checked(registry).startswith("not compared: ")
    registry.delete("trees", "1", force=True)
    assert sorted(path.name for path in (registry.root / "trees" / "predictions").iterdir()) == ["3.npz"]


def test_a_version_that_cannot_be_loaded_is_refused_even_by_force(registry: Registry, bundle: Path) -> None:
    for _ in range(2):
        registry.register(bundle, "trees")
    (registry.root / "trees" / "2" / "model.onnx").write_bytes(b"")
    with pytest.raises(PromotionRefused, match=r"loads: .*the bundle is not what was exported") as refused:
        promote(registry, "trees", "2", force=True, by="ann")
    assert "--force" not in str(refused.value), "it is not proposed where it would not help"


def test_a_private_model_answers_nobody_else_so_it_is_not_deployed(registry: Registry, bundle: Path) -> None:
    registry.register(bundle, "trees")
    registry.reserve("insects", Access("ann", "private"))
    registry.register(bundle, "insects")
    assert registry.access("insects") == Access("ann", "private")
    with pytest.raises(PromotionRefused, match="insects is private to its owner"):
        promote_to_default(registry, Deployment("insects"), force=True, by="root")
    registry.set_access("insects", Access("ann", "shared"))
    promote_to_default(registry, Deployment("insects"), by="root")
    assert means(registry) == "insects@1"


def test_a_reservation_does_not_change_whose_an_existing_model_is(registry: Registry, bundle: Path) -> None:
    registry.register(bundle, "trees")
    registry.reserve("trees", Access("bob", "private"))
    assert registry.access("trees") == Access()


def test_a_damaged_record_of_access_is_for_administrators_alone(registry: Registry, bundle: Path) -> None:
    registry.reserve("trees", Access("ann", "private"))
    registry.register(bundle, "trees")
    (registry.root / "trees" / "access.json").write_text("{")
    access = registry.access("trees")
    assert not access.allows("ann")
    assert not access.allows("bob")
