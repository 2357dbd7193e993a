"""A real job on a disk that fills up under it, database and all: it waits, and when there is space again it goes on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from folders import path_of
from job_standin import wait
from tiny_training import write_images

from finetune.errors import DiskFull, StoreError
from finetune.executors import endings
from finetune.executors.local import LocalExecutor
from finetune.jobs.database import open_database
from finetune.jobs.job import Job
from finetune.jobs.store import JobStore
from finetune.jobs.worker import Worker, WorkerSettings
from finetune.spec import parse_spec
from finetune.storage.journal import read_lines

SMALL, LARGE = "6m", "400m"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"needs to mount a small disk: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_a_job_whose_disk_fills_up_ends_when_there_is_space(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "DISK_FULL_SECONDS", 0.5)
    for sample in write_images(tmp_path / "all", 36):
        (tmp_path / "pictures" / f"class{sample.target}").mkdir(parents=True, exist_ok=True)
        path_of(sample).rename(tmp_path / "pictures" / f"class{sample.target}" / path_of(sample).name)
    spec = parse_spec(
        {
            "training_file": str(tmp_path / "pictures"),
            "suffix": "full",
            "model": {"backbone": "test_resnet", "weights": "none", "input_size_px": 64},
            "method": {"type": "full"},
            "hyperparameters": {"n_epochs": 3, "batch_size": 6},
            "compute": {"device": "cpu", "threads": 1},
        }
    )
    store = JobStore(open_database(small_disk / "jobs.db"))
    job, _ = store.create("ada", spec.model_dump(mode="json"), spec_digest=spec.digest(), suffix="full")
    settings = WorkerSettings(threads=1, heartbeat_seconds=1.0, retry_base_seconds=0.2, min_free_bytes=1 << 20)
    worker = Worker(store, LocalExecutor(), small_disk, settings)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (3 << 20))  # what is left suffices to begin with

    def has_waited() -> bool:
        worker.step()
        return any("disk is full" in event.message for event in store.events(job.id) if event.kind == "requeued")

    wait(has_waited, seconds=240)
    assert not _job(store, job).finished
    subprocess.run(["mount", "-o", f"remount,size={LARGE}", small_disk], check=True)

    def has_ended() -> bool:
        worker.step()
        return _job(store, job).finished

    wait(has_ended, seconds=240)
    done = _job(store, job)
    assert done.state == "succeeded", (done.error_message, [event.message for event in store.events(job.id)])
    assert [line["kind"] for line in read_lines(small_disk / "runs" / job.id / "events.jsonl")].count("succeeded") == 1


def _job(store: JobStore, job: Job) -> Job:
    try:
        return store.get(job.id)
    except (DiskFull, StoreError):
        return job
