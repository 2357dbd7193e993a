"""From held-out answers to thresholds, checked on other images; the registry's switch; the model card."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from standin import picture, write_bundle

from finetune.bundle.calibration import Calibration, CertaintyEstimator, CertaintyOptions, parse_subspace, write_subspace
from finetune.bundle.card import model_card
from finetune.bundle.manifest import read_manifest
from finetune.bundle.registry import Registry
from finetune.cli import cli
from finetune.errors import BundleError, InvalidInput
from finetune.evaluation.calibrate import (
    FittedCalibration,
    accuracy_coverage,
    check_calibration,
    fit_calibration,
    reliability_after,
)
from finetune.evaluation.predictions import Predictions, digests_as_rows
from finetune.tasks import task_named

CLASSES = ("ash", "beech", "cedar", "elm")


def answers(n: int, seed: int, *, split: str = "val", sharpness: float = 3.0, elsewhere: bool = False) -> Predictions:
    """Answers of a model that is right about four times in five, and too sure; embeddings lie around one place for each class."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 4, n)
    honest = rng.normal(0, 1, (n, 4)) + 2.0 * np.eye(4)[targets]
    places = np.random.default_rng(99).normal(0, 1, (5, 24))
    embedding = places[4 if elsewhere else targets] + rng.normal(0, 0.3, (n, 24))
    return Predictions(
        split=split,
        task="multiclass",
        classes=CLASSES,
        ids=tuple(f"{split}/{index}.jpg" for index in range(n)),
        sha256=digests_as_rows([""] * n),
        targets=targets.astype(np.int64),
        logits=(sharpness * honest).astype(np.float32),
        embedding=embedding.astype(np.float32),
    )


def fitted(n: int = 400) -> FittedCalibration:
    found = fit_calibration(answers(n, 0), 1.0, embeddings_match=True)
    assert found is not None
    return found


def test_what_is_learnt_on_held_out_images_holds_on_others() -> None:
    checked = check_calibration(fitted(2000), answers(2000, 1, split="test"), 1.0).checked
    assert checked["split"] == "test"
    assert checked["coverage"]["low"] <= 0.90 <= checked["coverage"]["high"] + 0.01
    assert 1.0 <= checked["coverage"]["mean_size"] < 2.0
    assert checked["precision"]["high"] >= 0.95
    assert 0.2 < checked["precision"]["answered"] < 0.9
    assert checked["unlike"]["value"] == pytest.approx(0.05, abs=0.03)


def test_images_of_other_things_are_unlike_anything_seen() -> None:
    found, others = fitted(), answers(100, 2, elsewhere=True)
    estimator = CertaintyEstimator(CLASSES, found.calibration, found.subspace)
    asked = estimator.resolved(CertaintyOptions(precision=0.8))
    probs = np.eye(4)[others.labels]  # as sure as can be
    said = [estimator.estimate(p, e, asked) for p, e in zip(probs, others.embedding, strict=True)]
    assert sum(one.reason == "unlike" for one in said) >= 95


def test_the_numbers_come_back_from_a_manifest() -> None:
    calibration = fitted().calibration
    assert Calibration.of({"temperature": 1.0, "held_out": calibration.to_dict()}) == calibration
    assert Calibration.of({"temperature": 1.0}) is None
    with pytest.raises(BundleError, match="held_out of the bundle is not valid"):
        Calibration.of({"held_out": {"split": "val"}})


def test_few_images_show_little_and_very_few_nothing() -> None:
    few = fit_calibration(answers(30, 0), 1.0, embeddings_match=True)
    assert few is not None
    assert (few.subspace, few.calibration.novelty) == (None, ())
    assert max(few.calibration.coverage) == "0.96"  # 30 / 31 is 0.968
    assert "0.95" not in few.calibration.precision  # 45 answers, all right, would be needed
    assert fit_calibration(answers(19, 0), 1.0, embeddings_match=True) is None


def test_embeddings_of_other_models_give_no_novelty() -> None:
    found = fit_calibration(answers(400, 0), 1.0, embeddings_match=False)
    assert found is not None
    assert (found.subspace, found.calibration.novelty) == (None, ())


def test_a_temperature_is_judged_on_images_that_did_not_fit_it() -> None:
    sharp = answers(1000, 3, sharpness=3.0)
    before = reliability_after(sharp, 1.0, fitted_on_these=False)
    after = reliability_after(sharp, 123.0, fitted_on_these=True)  # the temperature given is not used for any of them
    assert after.values["ece"] < before.values["ece"] / 2
    assert after.values["top1"] == before.values["top1"]
    assert after.n == before.n == 1000


def test_the_curve_ends_at_the_accuracy_on_all_images_and_falls_towards_it() -> None:
    table = answers(500, 4)
    curve = accuracy_coverage(table, 1.0)
    right = (table.logits.argmax(axis=1) == table.labels).mean()
    assert (curve.answered[-1], curve.accuracy[-1]) == (1.0, pytest.approx(right))
    assert curve.accuracy[19] > curve.accuracy[-1]
    assert all(low <= value <= high for low, value, high in zip(curve.low, curve.accuracy, curve.high, strict=True))


def test_a_subspace_comes_back_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    subspace = fitted().subspace
    assert subspace is not None
    write_subspace(tmp_path / "novelty.npz", subspace)
    again = parse_subspace(tmp_path, (tmp_path / "novelty.npz").read_bytes())
    np.testing.assert_array_equal(again.components, subspace.components)
    with pytest.raises(BundleError, match=r"novelty\.npz cannot be read"):
        parse_subspace(tmp_path, b"PK nothing")


# --- the switch, the card, the commands -----------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("FINETUNE_HOME", str(tmp_path))
    three = Calibration(**{**fitted().calibration.to_dict(), "class_coverage": {}, "precision": {}, "novelty": ()})
    registry = Registry(tmp_path / "models")
    registry.register(write_bundle(tmp_path / "colours", calibration=three), "colours")
    registry.register(write_bundle(tmp_path / "old"), "old")
    return registry


def test_only_what_can_be_shown_is_switched_on(registry: Registry) -> None:
    with pytest.raises(InvalidInput, match=r"too few for a precision of 0\.9: they are too few for any precision"):
        registry.set_abstention("colours", None, 0.9)
    with pytest.raises(InvalidInput, match="made without calibration"):
        registry.set_abstention("old", "1", 0.9)
    assert read_manifest(registry.resolve("colours").path).abstain == {}


def test_predict_prints_the_set_and_refuses_what_a_bundle_cannot_say(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(picture("red"))
    done = CliRunner().invoke(cli, ["predict", str(tmp_path / "red.png"), "--model", "colours", "--coverage", "0.9"])
    assert (done.exit_code, "90% set: red" in done.output) == (0, True), done.output
    done = CliRunner().invoke(cli, ["predict", str(tmp_path / "red.png"), "--model", "old", "--abstain"])
    assert done.exit_code != 0
    arguments = [
        "predict",
        str(tmp_path / "red.png"),
        "--model",
        "colours",
        "--coverage",
        "0.9",
        "--out",
        str(tmp_path / "a.csv"),
    ]
    refused = CliRunner().invoke(cli, arguments)
    assert (refused.exit_code, "use --json" in refused.output) == (2, True)


def test_the_card_command_prints_what_the_bundle_records(registry: Registry) -> None:
    done = CliRunner().invoke(cli, ["models", "card", "colours"])
    assert done.exit_code == 0
    assert done.output.startswith("---\n")
    assert "# colours@1" in done.output
    assert "- It abstains only on request" in done.output


def test_a_card_escapes_names_and_says_what_is_not_known(registry: Registry) -> None:
    manifest = read_manifest(registry.resolve("old").path)
    odd = dataclasses.replace(
        manifest,
        classes=("<b>red</b>", "a|b", "snake_case"),
        metrics={"val/top1": 0.5, "val/top1_low": 0.4, "val/top1_high": 0.6, "val/n": 40.0},
        backbone={"name": "tiny_net", "weights": {"source": "package", "identifier": "tiny==1", "license": "Apache-2.0"}},
    )
    card = model_card(odd)
    assert "\\<b\\>red\\</b\\>, a\\|b, snake_case" in card
    assert 'license: "apache-2.0"' in card
    assert "The pretrained weights come under Apache-2.0." in card
    assert "| top-1 accuracy | 50.0% (40.0% – 60.0%) |" in card
    assert "No image was kept apart from all choices" in card
    assert "has no calibration on held-out images" in card
    bare = model_card(dataclasses.replace(manifest, backbone={"name": "x", "weights": {"source": "none"}}))
    assert "was not pretrained" in bare
    assert "records no figures" in bare


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (CertaintyOptions(precision=0.9), "precision"),
        (CertaintyOptions(abstain=True), "abstain"),
        (CertaintyOptions(abstain=True, precision=0.9), "abstain"),
        (CertaintyOptions(coverage=0.9), "coverage"),
    ],
)
def test_a_model_of_several_labels_refuses_what_was_asked_by_its_own_name(asked: CertaintyOptions, field: str) -> None:
    with pytest.raises(InvalidInput, match=f"so {field} does not apply to it") as refused:
        CertaintyEstimator(CLASSES, None, None, unavailable=task_named("multilabel").why_no_prediction_sets).resolved(asked)
    assert [problem.where for problem in refused.value.problems] == [field]
