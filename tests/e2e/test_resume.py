"""A training run that is killed again and again ends with the bits of one that was left alone."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import signal
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from folders import local_sample
from tiny_training import fingerprint, train_tiny, write_images

from finetune.data.loader import Batch
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir
from finetune.training.final_weights import TrainBatches

N_IMAGES = 38
EVERYTHING_RANDOM = {
    "method": {"type": "gradual", "bn": "train"},
    "hyperparameters": {"n_epochs": 5, "batch_size": 6, "mixup": 0.2, "ema": True, "learning_rate": 0.01},
}
DEADLINE_SECONDS = 120


def _train(folder: Path, given: dict[str, Any], loader_threads: int, reports: Connection, kill_after: int | None) -> None:
    """In a process of its own: reports each batch as it is asked for, and at last the fingerprint of the result.

    After `kill_after` batches it is killed at some moment in the next step, at whose end it waits: a machine that is slow to kill
    it does not let it come to its end.
    """
    samples = [local_sample(path, int(path.stem) % 3, "train") for path in sorted((folder / "images").glob("*.png"))]
    taken = itertools.count()

    def reporting(train: TrainBatches) -> TrainBatches:
        def batches(epoch: int, start_step: int) -> Iterable[Batch]:
            for batch in train(epoch, start_step):
                if next(taken) == kill_after:
                    signal.pause()
                reports.send("batch")
                yield batch

        return batches

    fitted, classifier = train_tiny(RunDir(folder), samples, given, loader_threads=loader_threads, wrap=reporting)
    reports.send(fingerprint(fitted, classifier))


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    """Start processes from one that has imported everything and computed nothing, which is quick and safe to fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["finetune.training.fit", "finetune.data.transforms", "finetune.model.backbone"])
    forkserver.ensure_running()
    yield context
    forkserver._forkserver._stop()


def _attempt(
    context: ForkServerContext, folder: Path, given: dict[str, Any], loader_threads: int, kill_after: int | None
) -> dict[str, Any] | None:
    """The run's fingerprint, or None where it was killed (when it had asked for `kill_after` batches) before it could tell."""
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(folder, given, loader_threads, sending, kill_after))
    process.start()
    sending.close()
    seen = 0
    try:
        while receiving.poll(DEADLINE_SECONDS):
            report = receiving.recv()
            if isinstance(report, dict):
                return report
            seen += 1
            if seen == kill_after:
                process.kill()
    except EOFError:
        assert kill_after is not None, "the process died by itself"
        return None
    finally:
        process.join(DEADLINE_SECONDS)
        assert process.exitcode in (0, -signal.SIGKILL)
    raise AssertionError(f"no report in {DEADLINE_SECONDS} seconds")


def _killed_until_done(
    context: ForkServerContext, folder: Path, given: dict[str, Any], kills: int, chance: random.Random
) -> dict[str, Any]:
    """The fingerprint after `kills` deaths at random steps, each resumed with another number of loader threads."""
    for _ in range(kills):
        result = _attempt(context, folder, given, chance.choice((1, 2, 3)), kill_after=chance.randint(2, 6))
        assert result is None, "it was to be killed before the end: lower the steps between kills"
    result = _attempt(context, folder, given, chance.choice((1, 2, 3)), kill_after=None)
    assert result is not None
    return result


def _folder(root: Path, name: str) -> Path:
    write_images(root / name / "images", N_IMAGES)
    return root / name


@pytest.mark.longer
def test_a_run_killed_at_random_steps_ends_bit_equal_to_an_uninterrupted_one(
    processes: ForkServerContext, tmp_path: Path
) -> None:
    uninterrupted = _attempt(processes, _folder(tmp_path, "whole"), EVERYTHING_RANDOM, 1, kill_after=None)
    killed = _folder(tmp_path, "killed")
    resumed = _killed_until_done(processes, killed, EVERYTHING_RANDOM, kills=4, chance=random.Random(0))
    assert resumed == uninterrupted
    steps = [event["step"] for event in read_lines(killed / "events.jsonl") if event["kind"] == "resumed"]
    assert len(steps) == 4
    assert any(step % 6 for step in steps), "at least one resume in the middle of an epoch"


@pytest.mark.slow
def test_twenty_five_kills_over_every_method_change_no_bit(processes: ForkServerContext, tmp_path: Path) -> None:
    chance = random.Random(25)
    kills = 0
    for method in ("gradual", "full", "partial"):
        for bn in ("frozen", "train", "recalibrate"):
            given = {**EVERYTHING_RANDOM, "method": {"type": method, "bn": bn, "warm_head": method != "full"}}
            whole = _attempt(processes, _folder(tmp_path, f"whole-{method}-{bn}"), given, 1, kill_after=None)
            resumed = _killed_until_done(processes, _folder(tmp_path, f"killed-{method}-{bn}"), given, 3, chance)
            assert resumed == whole, f"{method} with bn {bn}"
            kills += 3
    assert kills == 27
