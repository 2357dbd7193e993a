"""What a run measures for its diagnosis: a sample of training images, dead channels, neighbours, normalisation statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_runs import carry_out_at, shared_at, tiny_spec, write_stripes
from tiny_training import fingerprint, tiny_classifier, tiny_recipe, train_tiny, write_images
from torch import nn

from finetune.evaluation import predictions as tables
from finetune.evaluation.diagnose import diagnose, read_diagnosis
from finetune.evaluation.diagnose.records import RunRecords
from finetune.features.batch_statistics import GROUP_SIZE, divergences
from finetune.features.neighbours import nearest_training_images
from finetune.runs.preprocessing import measure_finished_run
from finetune.storage.files import read_json
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.training.activity import Activity, measuring_activity
from finetune.training.sample import SMALLEST, choose_sample, plan_sample

FULL = {
    "method": {"type": "full"},
    "augmentation": "none",
    "hyperparameters": {"n_epochs": 3, "batch_size": 8, "ema": False, "early_stopping_epochs": None},
}


# ── the sample ────────────────────────────────────────────────────────────────────────────────────


def test_a_smaller_sample_is_part_of_a_larger_one(tmp_path: Path) -> None:
    samples = write_images(tmp_path, 40)
    large, small = (set(choose_sample(samples, size).tolist()) for size in (30, 10))
    assert len(small) == 10
    assert small < large
    assert choose_sample(samples, 100).tolist() == list(range(40))


def test_the_sample_costs_about_a_hundredth_of_the_training(tmp_path: Path) -> None:
    samples = write_images(tmp_path, 40)
    classifier = tiny_classifier()
    for n_epochs in (1, 4, 64):
        recipe = tiny_recipe(classifier, 4000, method={"type": "full"}, hyperparameters={"n_epochs": n_epochs})
        plan = plan_sample(recipe, samples, (64, 64), None)
        assert {0, recipe.n_steps} <= plan.steps
        passes = len(plan.indices) * len(plan.steps)
        assert passes <= max(0.03 * recipe.n_steps * recipe.batch_size, 2 * SMALLEST)
    assert len(plan_sample(recipe, samples, (64, 64), 7).indices) == 7


def test_answering_the_sample_changes_no_bit_of_training(tmp_path: Path) -> None:
    """The tiny training has no sample; a run of the same recipe with one takes the same steps."""
    samples = write_images(tmp_path / "images", 30)
    given = {"method": {"type": "full"}, "hyperparameters": {"n_epochs": 2, "batch_size": 8}}
    without = fingerprint(*train_tiny(RunDir(tmp_path / "without"), samples, given))
    kept: dict[int, int] = {}
    with_sample = fingerprint(*train_tiny(RunDir(tmp_path / "with"), samples, given, sampled=kept))
    assert sorted(kept) == [0, 3, 6]
    assert with_sample["weights"] == without["weights"]


# ── dead channels ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_a_channel_that_is_constant_is_dead(channel_axis: int) -> None:
    output = torch.rand(4, 8, 6, 6)
    output[:, :2] = 0.0
    output[:, 2] = 3.0  # constant too: it passes nothing on
    activity = Activity()
    activity.update("stage1", output.movedim(1, channel_axis), channel_axis)
    assert activity.dead_fractions == {"stage1": 3 / 8}
    activity.update("stage1", torch.rand(4, 8, 6, 6), 1)
    assert activity.dead_fractions == {"stage1": 3 / 8}, "the worst layer of a stage counts"


def test_relus_that_were_sunk_are_heard(tmp_path: Path) -> None:
    classifier = tiny_classifier("test_resnet").eval()
    images = torch.rand(8, 3, 64, 64)
    with torch.no_grad(), measuring_activity(classifier) as before:
        classifier(images)
    norms = [module for module in classifier.backbone.module.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.constant_(norm.bias, -100.0)
    with torch.no_grad(), measuring_activity(classifier) as after:
        classifier(images)
    assert max(before.dead_fractions.values()) < 0.5
    assert max(after.dead_fractions.values()) == 1.0


# ── neighbours ────────────────────────────────────────────────────────────────────────────────────


def test_a_copy_is_much_nearer_to_its_original_than_to_others() -> None:
    chance = np.random.default_rng(0)
    train = chance.normal(size=(60, 16)).astype(np.float32)
    copies, others = train[[7, 30]] + 0.01, chance.normal(size=(20, 16)).astype(np.float32)
    found = nearest_training_images(train, np.concatenate([copies, others]))
    assert found is not None
    assert found.nearest[:2].tolist() == [7, 30]
    assert found.ratio[:2].max() < 0.1
    assert found.ratio[2:].min() > 0.4


def test_features_that_never_vary_do_not_matter_and_few_images_have_no_neighbours() -> None:
    train = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    train[:, 3] = 5.0
    held_out = train[:2].copy()
    held_out[:, 3] = 1e6
    found = nearest_training_images(train, held_out)
    assert found is not None
    assert found.nearest.tolist() == [0, 1]
    assert nearest_training_images(train[:5], held_out) is None


# ── normalisation statistics ──────────────────────────────────────────────────────────────────────


def test_statistics_that_are_remembered_agree_and_those_of_exchanged_channels_do_not() -> None:
    classifier = tiny_classifier("test_resnet")
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 100, (3 * GROUP_SIZE, 64, 64, 3), dtype=np.uint8)
    pixels[..., 0] += 120
    for module in classifier.backbone.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
            module.reset_running_stats()
    classifier.backbone.module.train()
    with torch.no_grad():
        classifier.backbone(classifier.normalise(torch.from_numpy(pixels)))
    own, exchanged = divergences(classifier, pixels), divergences(classifier, np.ascontiguousarray(pixels[..., ::-1]))
    assert own is not None
    assert exchanged is not None
    assert own.shape == exchanged.shape
    assert len(own) == 3
    assert own.mean() < 0.1 * exchanged.mean()
    assert divergences(tiny_classifier("test_vit"), pixels) is None


# ── whole runs ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    home = tmp_path_factory.mktemp("diagnosed")
    run = RunDir(home / "run")
    carry_out_at(home / "home", tiny_spec(write_stripes(home, 60), **FULL), run)
    return run


def test_a_run_answers_its_sample_at_the_start_and_at_the_end(full_run: RunDir) -> None:
    steps = [int(path.stem.rpartition("-")[2]) for path in sorted(full_run.measurements.glob("train-step-*.npz"))]
    n_steps = max(line["step"] for line in read_lines(full_run.metrics))
    assert (steps[0], steps[-1]) == (0, n_steps)
    first, last = (tables.read(full_run.train_sample_at(step)) for step in (steps[0], steps[-1]))
    assert first.ids == last.ids
    assert first.split == "train"
    logged = [
        line["values"]["train_sample/loss"] for line in read_lines(full_run.metrics) if "train_sample/loss" in line["values"]
    ]
    records = RunRecords.read(full_run.root)
    assert logged[-1] == pytest.approx(float(records.losses(last).mean()), abs=1e-6)


def test_a_run_writes_its_diagnosis_into_its_folder_its_journal_and_its_report(full_run: RunDir) -> None:
    found = read_diagnosis(full_run)
    assert found == diagnose(full_run.root)
    assert "diagnosed" in [event["kind"] for event in read_lines(full_run.events)]
    page = full_run.report.read_text()
    assert "<h2>Diagnosis</h2>" in page
    assert all(one.title.lower() in page.lower() for one in found.clear)


def test_every_measured_stage_belongs_to_the_backbone(full_run: RunDir) -> None:
    records = RunRecords.read(full_run.root)
    assert set(records.parts) == {*records.stage_names, "head"}
    assert records.signal("dead_channels", next(iter(records.stage_names)))


def test_a_probe_measures_neighbours_of_all_held_out_images(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    carry_out_at(tmp_path / "home", tiny_spec(write_stripes(tmp_path, 60), method="linear_probe"), run)
    records = RunRecords.read(run.root)
    sizes = records.resolved["dataset"]["sizes"]
    assert len(records.neighbours) == sizes["val"] + sizes["test"]
    assert list(records.samples) == [0]
    assert len(records.samples[0]) == sizes["train"]


@pytest.mark.longer
def test_preprocessing_is_measured_when_asked_and_only_of_pretrained_weights(tmp_path: Path) -> None:
    shared = shared_at(tmp_path / "home")
    weights = tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    state = tiny_classifier("test_resnet").backbone.module.state_dict()
    safetensors.torch.save_file(state, weights)
    pictures = write_stripes(tmp_path, 60)
    drawn, loaded = RunDir(tmp_path / "drawn"), RunDir(tmp_path / "loaded")
    for run, model in (
        (drawn, {}),
        (loaded, {"model": {"backbone": "test_resnet", "weights": str(weights), "input_size_px": 64}}),
    ):
        carry_out_at(tmp_path / "home", tiny_spec(pictures, method="linear_probe", **model), run)
    assert not drawn.preprocessing.exists()
    measured = read_json(loaded.preprocessing)
    assert len(measured["others"]) >= 4
    assert all(set(one) == {"name", "statistics", "left_out"} for one in measured["others"])
    loaded.preprocessing.unlink()
    measure_finished_run(loaded, shared)
    assert read_json(loaded.preprocessing) == measured
    measure_finished_run(drawn, shared)
    assert not drawn.preprocessing.exists(), "random weights expect no particular preprocessing"
