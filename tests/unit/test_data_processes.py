"""Views computed by processes: the same batches as the loader's own, clear errors, and nothing left behind."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from folders import path_of, write_classes
from tiny_runs import carry_out_at, tiny_spec, weights_of, write_stripes

from finetune.bundle.preprocess import Preprocess
from finetune.data.augment import build_augment
from finetune.data.index import index_dataset
from finetune.data.loader import Batch, TrainLoader
from finetune.data.pixels import PixelStore
from finetune.data.processes import ViewProcesses
from finetune.errors import ImageError, OutOfMemory
from finetune.storage.rundir import RunDir
from finetune.storage.store import Store
from finetune.training.compute import Compute, view_processes

PREPROCESS = Preprocess((16, 16), "crop", 1.0, "bilinear", (0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> TrainLoader:
    folder = tmp_path_factory.mktemp("photos")
    samples = index_dataset(write_classes(folder / "data", {"a": 15, "b": 8}, (40, 30))).samples
    classes = np.array([sample.target for sample in samples])
    return TrainLoader(
        samples,
        build_augment("default", None, PREPROCESS),
        5,
        seed=3,
        pixels=PixelStore(Store(folder / "cache")),
        classes=classes,
    )


def pids(processes: ViewProcesses) -> list[int]:
    return [process.pid for process in processes._running]


def wait_until_gone(numbers: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(number) for number in numbers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_same(left: Batch, right: Batch) -> None:
    np.testing.assert_array_equal(left.images, right.images)
    np.testing.assert_array_equal(left.indices, right.indices)


def test_processes_give_the_batches_of_the_loader_in_any_epoch_from_any_step(loader: TrainLoader) -> None:
    with ViewProcesses(loader, 2) as running:
        for epoch, start_step in ((0, 0), (1, 3)):
            expected = replace(loader, epoch=epoch, start_step=start_step)
            found = list(running.batches(epoch, start_step))
            assert len(found) == len(expected) > 0
            for one, other in zip(found, expected, strict=True):
                assert_same(one, other)
        assert running.cpu_seconds > 0
        left = running.batches(0)
        next(left)
        left.close()  # an epoch that is left early does not disturb the next one
        assert_same(next(iter(running.batches(2))), next(iter(replace(loader, epoch=2))))
        numbers = pids(running)
    assert len(numbers) == 2
    wait_until_gone(numbers)


def test_an_image_that_does_not_decode_is_named(loader: TrainLoader, tmp_path: Path) -> None:
    samples = index_dataset(write_classes(tmp_path / "data", {"a": 4, "b": 4}, (40, 30))).samples
    damaged = path_of(samples[5])
    damaged.write_bytes(b"not an image")
    with (
        ViewProcesses(TrainLoader(samples, loader.augment, 4, seed=0), 1) as running,
        pytest.raises(ImageError, match=damaged.name),
    ):
        list(running.batches(0))


def test_a_killed_process_is_named_and_memory_with_it(loader: TrainLoader) -> None:
    with ViewProcesses(loader, 1) as running:
        next(running.batches(0))
        os.kill(pids(running)[0], signal.SIGKILL)
        with pytest.raises(OutOfMemory, match="one of 1 processes that decode and augment images was killed"):
            list(running.batches(1))


@pytest.mark.longer
def test_processes_end_with_their_parent(loader: TrainLoader, tmp_path: Path) -> None:
    pickled = tmp_path / "loader"
    pickled.write_bytes(pickle.dumps(loader))
    script = (
        "import os, pickle, sys; from finetune.data.processes import ViewProcesses\n"
        "running = ViewProcesses(pickle.loads(open(sys.argv[1], 'rb').read()), 2); next(running.batches(0))\n"
        "print(*[process.pid for process in running._running], flush=True); os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(pickled)], stdout=subprocess.PIPE, text=True, check=False)
    numbers = [int(word) for word in ended.stdout.split()]
    assert len(numbers) == 2
    wait_until_gone(numbers)


def test_explicit_transforms_are_built_anew_in_another_process() -> None:
    given = [{"HorizontalFlip": {"p": 0.5}}, {"RandomBrightnessContrast": {"p": 1.0}}]
    augment = build_augment("default", given, PREPROCESS)
    again = pickle.loads(pickle.dumps(augment))
    rgb = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    assert again.digest() == augment.digest()
    np.testing.assert_array_equal(again(rgb, 7), augment(rgb, 7))


@pytest.mark.parametrize(
    ("device", "threads", "n_views", "expected"),
    [
        ("cpu", 16, 10**6, 0),  # the network takes the cores
        ("cuda", 16, 10**6, 12),
        ("cuda", 8, 10**6, 6),
        ("cuda", 2, 10**6, 0),
        ("cuda", 16, 1_000, 0),  # over before the processes have started
    ],
)
def test_processes_are_for_long_runs_on_a_gpu(device: str, threads: int, n_views: int, expected: int) -> None:
    assert view_processes(Compute(device, "auto", threads), n_views) == expected  # type: ignore[arg-type]


@pytest.mark.longer
def test_a_run_ends_with_the_same_weights_whoever_computes_its_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_spec(write_stripes(tmp_path, 60), method="full", hyperparameters={"n_epochs": 2})
    plain = carry_out_at(tmp_path / "home", spec, RunDir(tmp_path / "plain"))
    asked: list[int] = []

    def two(compute: Compute, n_views: int) -> int:
        asked.append(n_views)
        return 2

    monkeypatch.setattr("finetune.training.train.view_processes", two)
    helped = carry_out_at(tmp_path / "home", spec, RunDir(tmp_path / "helped"))
    assert asked
    assert plain.bundle is not None
    assert helped.bundle is not None
    assert weights_of(Path(helped.bundle)) == weights_of(Path(plain.bundle))
    assert helped.metrics == plain.metrics
