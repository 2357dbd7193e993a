"""The training loop: what it keeps, when it stops, what it says when it cannot go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import (
    MULTICLASS,
    class_means,
    fingerprint,
    targets_of,
    tiny_classifier,
    tiny_recipe,
    train_tiny,
    write_images,
)

from finetune.data.dataset import Sample
from finetune.data.loader import Batch, EvalLoader
from finetune.errors import CheckpointError, TrainingError
from finetune.progress import Progress
from finetune.runtime.seconds import Seconds
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.training import checkpoint, evaluator, fit
from finetune.training.final_weights import TrainBatches
from finetune.training.interrupt import Interrupted
from finetune.training.objectives.multiclass import MulticlassObjective
from finetune.training.state import improves

TWO_EPOCHS = {"method": "partial", "hyperparameters": {"n_epochs": 2, "batch_size": 6, "learning_rate": 0.003}}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return write_images(tmp_path_factory.mktemp("images"), 20)


def events(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(run.events) if event["kind"] == kind]


def test_a_run_logs_each_epoch_and_ends_with_the_best_weights(tmp_path: Path, samples: list[Sample]) -> None:
    run = RunDir(tmp_path)
    seen: list[Progress] = []
    fitted, classifier = train_tiny(run, samples, TWO_EPOCHS, progress=seen.append)
    assert read_lines(run.metrics) == list(fitted.history)
    epochs = [line for line in fitted.history if "val/top1" in line["values"]]
    assert [(line["step"], line["epoch"]) for line in epochs] == [(0, 0.0), (3, 1.0), (6, 2.0)]
    assert {"train/loss", "train/top1", "train/lr", "train/images_per_second", "val/loss", "val/top1"} == set(epochs[1]["values"])
    assert "train/update_ratio/head" in fitted.history[1]["values"]
    assert not classifier.training
    assert evaluate(classifier, samples[-6:]) == pytest.approx((fitted.best["val/loss"], fitted.best["val/top1"]))
    assert seen[0].phase == "training"
    assert {"loss", "images/s", "eta_seconds", "val/top1"} <= set(seen[-1].values)


def evaluate(classifier: Any, samples: list[Sample]) -> tuple[float, float]:
    """Validation loss and accuracy, computed without the loop."""
    (batch,) = EvalLoader(samples, classifier.backbone.preprocess)
    labels = torch.from_numpy(targets_of(samples))
    with torch.no_grad():
        logits = classifier(classifier.normalise(torch.from_numpy(batch.images)))
    return float(torch.nn.functional.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).double().mean())


def test_what_is_frozen_is_proved_unchanged_and_what_trains_is_not(tmp_path: Path, samples: list[Sample]) -> None:
    cold = {**TWO_EPOCHS, "method": {"type": "partial", "warm_head": False}}
    fitted, classifier = train_tiny(RunDir(tmp_path), samples, cold)
    assert fitted.frozen_before == fitted.frozen_after
    *frozen, top = classifier.backbone.stages
    fresh = tiny_classifier().backbone.module.state_dict()
    after = classifier.backbone.module.state_dict()
    names = [name for stage in frozen for name in (*stage.parameters, *stage.buffers)]
    assert len(names) > 20
    assert all(torch.equal(after[name], fresh[name]) for name in names)
    assert not any(torch.equal(after[name], fresh[name]) for name in top.parameters)


def test_a_method_without_steps_solves_the_head_and_evaluates_it(tmp_path: Path, samples: list[Sample]) -> None:
    fitted, classifier = train_tiny(RunDir(tmp_path), samples, {"method": "linear_probe"})
    expected = tiny_classifier()
    class_means(expected, samples[:-6])
    torch.testing.assert_close(classifier.head.weight, expected.head.weight)
    assert (fitted.n_steps, fitted.chosen) == (0, "the solved head on the pretrained backbone")


def test_solving_the_head_counts_for_the_seconds_that_it_says(tmp_path: Path, samples: list[Sample]) -> None:
    """Without those of computing its features, which are counted elsewhere; also in a run that is resumed."""
    run = RunDir(tmp_path)
    fitted, _ = train_tiny(run, samples, TWO_EPOCHS, head_seconds=Seconds(1e6, 2e6))
    again, _ = train_tiny(run, samples, TWO_EPOCHS)
    for seconds in (fitted.seconds, again.seconds):
        assert seconds.wall == pytest.approx(1e6, abs=1e5)
        assert seconds.cpu == pytest.approx(2e6, abs=1e5)


def test_a_finished_run_is_not_trained_again(tmp_path: Path, samples: list[Sample]) -> None:
    first, trained = train_tiny(RunDir(tmp_path), samples, TWO_EPOCHS)

    def refuse(_: TrainBatches) -> TrainBatches:
        def batches(epoch: int, start_step: int) -> Iterable[Batch]:
            raise AssertionError("asked for a batch")

        return batches

    again, same = train_tiny(RunDir(tmp_path), samples, TWO_EPOCHS, wrap=refuse)
    assert fingerprint(again, same) == fingerprint(first, trained)
    assert again.resumed_at_step == 6


def stop_at(step: int, number: signal.Signals) -> Any:
    """Sends this process `number` while the batch of `step` is being asked for."""

    def wrap(train: TrainBatches) -> TrainBatches:
        def batches(epoch: int, start_step: int) -> Iterable[Batch]:
            for position, batch in enumerate(train(epoch, start_step), start=start_step + 3 * epoch):
                if position == step:
                    os.kill(os.getpid(), number)
                yield batch

        return batches

    return wrap


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_interrupts(tmp_path: Path, samples: list[Sample], number: signal.Signals) -> None:
    whole = fingerprint(*train_tiny(RunDir(tmp_path / "whole"), samples, TWO_EPOCHS))
    run = RunDir(tmp_path / "stopped")
    handlers = [signal.getsignal(other) for other in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match=number.name):
        train_tiny(run, samples, TWO_EPOCHS, every_steps=None, wrap=stop_at(4, number))
    assert [signal.getsignal(other) for other in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert events(run, "interrupted")[0]["step"] == 5
    resumed, classifier = train_tiny(run, samples, TWO_EPOCHS)
    assert resumed.resumed_at_step == 5
    assert fingerprint(resumed, classifier) == whole


def test_a_damaged_checkpoint_costs_steps_but_no_bit(tmp_path: Path, samples: list[Sample]) -> None:
    whole = fingerprint(*train_tiny(RunDir(tmp_path / "whole"), samples, TWO_EPOCHS))
    run = RunDir(tmp_path / "damaged")
    with pytest.raises(Interrupted):
        train_tiny(run, samples, TWO_EPOCHS, wrap=stop_at(4, signal.SIGTERM))
    newest = run.checkpoints / "step-00000005.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    resumed, classifier = train_tiny(run, samples, TWO_EPOCHS)
    assert resumed.resumed_at_step == 4
    assert "step-00000005.pt" in events(run, "checkpoint_damaged")[0]["message"]
    assert fingerprint(resumed, classifier) == whole


def test_with_every_checkpoint_damaged_the_run_begins_anew(tmp_path: Path, samples: list[Sample]) -> None:
    first = fingerprint(*train_tiny(RunDir(tmp_path), samples, TWO_EPOCHS))
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    again, classifier = train_tiny(RunDir(tmp_path), samples, TWO_EPOCHS)
    assert again.resumed_at_step is None
    assert fingerprint(again, classifier) == first


def test_lines_of_an_attempt_without_a_checkpoint_are_not_kept(tmp_path: Path, samples: list[Sample]) -> None:
    reference, _ = train_tiny(RunDir(tmp_path / "alone"), samples, TWO_EPOCHS)
    run = RunDir(tmp_path / "killed").create()
    run.metric(0, {"head/l2": 0.1}, epoch=0.0)
    again, _ = train_tiny(run, samples, TWO_EPOCHS)
    assert [line["step"] for line in again.history] == [line["step"] for line in reference.history]


def test_checkpoints_of_another_dataset_are_refused(tmp_path: Path, samples: list[Sample]) -> None:
    train_tiny(RunDir(tmp_path), samples, {"method": "linear_probe"})
    with pytest.raises(CheckpointError, match="dataset changed"):
        train_tiny(RunDir(tmp_path), samples, {"method": "linear_probe"}, identity={"spec": "a", "dataset": "other"})


def test_a_loss_that_is_not_finite_ends_the_run_with_step_and_learning_rate(
    tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MulticlassObjective, "loss", lambda self, logits, *_: logits.sum() * float("inf"))
    with pytest.raises(
        TrainingError, match=r"the loss became (nan|inf|-inf) at step 1 of 6, with learning rate 0\.0015.*multiplier"
    ):
        train_tiny(RunDir(tmp_path), samples, TWO_EPOCHS)
    found = checkpoint.load_newest(tmp_path / "checkpoints", lambda *_: None)
    assert found is not None
    assert found["state"]["step"] == 0, "nothing after the loss went wrong is kept"


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
def test_running_out_of_memory_names_the_batch_size(
    tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(MulticlassObjective, "loss", fail)
    with pytest.raises(TrainingError, match=r"out of memory at batch size 6\. Try hyperparameters.batch_size: 3"):
        train_tiny(RunDir(tmp_path), samples, TWO_EPOCHS)


def test_training_stops_when_validation_no_longer_gains(
    tmp_path: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "improves", lambda values, best, headline: not best)
    given = {"method": "partial", "hyperparameters": {"n_epochs": 9, "batch_size": 14, "early_stopping_epochs": 2}}
    fitted, _ = train_tiny(RunDir(tmp_path), samples, given)
    assert fitted.stopped_early
    assert (fitted.n_steps, fitted.best_step) == (2, 0)


def test_fine_tuning_never_ends_below_the_head_it_began_with(tmp_path: Path, samples: list[Sample]) -> None:
    wild = {"method": {"type": "full", "bn": "train"}, "hyperparameters": {"n_epochs": 1, "batch_size": 6, "learning_rate": 3.0}}
    fitted, _ = train_tiny(RunDir(tmp_path), samples, wild)
    start = next(line["values"] for line in fitted.history if "val/top1" in line["values"])
    assert fitted.best["val/top1"] >= start["val/top1"]


def test_the_better_weights_are_more_accurate_or_as_accurate_and_surer() -> None:
    best = {"val/top1": 0.8, "val/loss": 0.5}
    assert improves(best, {}, "top1")
    assert improves({"val/top1": 0.81, "val/loss": 0.9}, best, "top1")
    assert improves({"val/top1": 0.8, "val/loss": 0.49}, best, "top1")
    assert not improves({"val/top1": 0.8, "val/loss": 0.5}, best, "top1")
    assert not improves({"val/top1": 0.79, "val/loss": 0.1}, best, "top1")


def test_an_auxiliary_head_trains_with_the_rest(tmp_path: Path, samples: list[Sample]) -> None:
    from finetune.model.classifier import Classifier

    backbone = tiny_classifier().backbone
    torch.manual_seed(0)
    classifier = Classifier(backbone, 3, aux=True)
    recipe = tiny_recipe(
        classifier, 14, method={"type": "full", "warm_head": False}, hyperparameters={"n_epochs": 1, "batch_size": 7}
    )
    assert classifier.aux is not None
    before = classifier.aux.linear.weight.detach().clone()
    batches = list(EvalLoader(samples[:14], backbone.preprocess, batch_size=7))
    run = RunDir(tmp_path).create()
    targets = targets_of(samples[:14])
    fit.fit(
        classifier,
        recipe,
        lambda epoch, start: batches[start:],
        batches,
        run,
        fit.CheckpointSchedule({}),
        **MULTICLASS,
        train_targets=targets,
        val_targets=targets,
    )
    assert not torch.equal(classifier.aux.linear.weight, before)
