"""A job is killed at every named point of its life, once at each: it ends once, with the bits of a run that was left alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest
from crash_points import crashing_at
from folders import path_of
from job_standin import LEASE_SECONDS, Trace, drive, end_leases, result_of, submit, wait, worker
from onnx import numpy_helper
from sqlalchemy import text
from tiny_training import write_images

from finetune.bundle.predictor import Predictor
from finetune.bundle.registry import Registry
from finetune.executors.local import LocalExecutor
from finetune.jobs.database import open_database, reading
from finetune.jobs.job import Job
from finetune.jobs.store import JobStore
from finetune.jobs.worker import Worker, WorkerSettings
from finetune.spec import JobSpec, parse_spec
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir

WALL_CLOCK = ("train/images_per_second", "head/seconds", "head/feature_seconds", "head/feature_cpu_seconds")

TRAINING_POINTS = [
    "before replace spec.yaml",
    "before fsync split.csv",
    "after replace split.csv",
    "before replace resolved.json",
    "after replace *.shard",
    "before fsync step-00000000.pt",
    "before fsync step-00000010.pt",
    "before replace step-00000010.pt",
    "after replace step-00000010.pt",
    "before replace step-00000010.pt.sha256",
    "after replace step-00000015.pt.sha256",
    "after unlink step-00000000.pt.sha256",
    "after unlink step-00000005.pt",
    "before replace progress.json with exporting",
    "before replace val.npz",
    "after replace test.npz",
    "before replace evaluation.json",
    "before fsync model.onnx",
    "before rename bundle",
    "after rename bundle",
    "before replace report.html",
    "before rename 1",
    "after rename 1",
    "before replace aliases.json",
    "after replace aliases.json",
    "before fsync outcome.json",
    "before replace outcome.json",
    "after replace outcome.json",
]


# ── the training process ──────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures in it, where each point gets a workspace."""
    folder = tmp_path_factory.mktemp("crashes")
    for sample in write_images(folder / "all", 36):
        (folder / "pictures" / f"class{sample.target}").mkdir(parents=True, exist_ok=True)
        shutil.move(path_of(sample), folder / "pictures" / f"class{sample.target}")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(workspace: Path) -> str:
    home = workspace / "uninterrupted"
    store, job = _queue(home, workspace)
    _work(store, home)
    assert store.get(job.id).attempts == 1
    return _fingerprint(RunDir(home / "runs" / job.id))


@pytest.mark.slow
@pytest.mark.parametrize("point", TRAINING_POINTS)
def test_training_that_is_killed_at(point: str, workspace: Path, uninterrupted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home = workspace / re.sub(r"[^\w.]+", "-", point)
    store, job = _queue(home, workspace)
    with _crashing(home, point, monkeypatch):
        _work(store, home)
    assert (home / "crashed").exists(), "the point was not reached"
    done, run = store.get(job.id), RunDir(home / "runs" / job.id)
    assert done.state == "succeeded", done.error_message
    was_complete = run.outcome.stat().st_mtime_ns <= (home / "crashed").stat().st_mtime_ns
    assert done.attempts == (1 if was_complete else 2), "a complete run has nothing left to do"
    assert was_complete or point != "after replace outcome.json"
    assert [event.kind for event in store.events(job.id)].count("succeeded") == 1
    assert _fingerprint(run) == uninterrupted
    (version,) = Registry(home / "models").list()
    assert (version.name, version.version, version.aliases) == ("crash", "1", ("champion", "latest"))
    assert done.result is not None
    assert Path(done.result["bundle"]) == version.path
    Predictor.load(version.path)
    assert not list(home.glob("runs/**/.*.tmp")), "what was half written is swept away"


def _spec(pictures: Path) -> JobSpec:
    return parse_spec(
        {
            "training_file": str(pictures),
            "suffix": "crash",
            "model": {"backbone": "test_resnet", "weights": "none", "input_size_px": 64},
            "method": {"type": "full", "bn": "train"},
            "hyperparameters": {"n_epochs": 4, "batch_size": 5, "mixup": 0.2, "ema": True},
            "compute": {"device": "cpu", "precision": "float32", "threads": 1},
        }
    )


def _queue(home: Path, workspace: Path) -> tuple[JobStore, Job]:
    home.mkdir()
    store, spec = JobStore(open_database(home / "jobs.db")), _spec(workspace / "pictures")
    job, _ = store.create("ada", spec.model_dump(mode="json"), spec_digest=spec.digest(), suffix="crash")
    return store, job


def _work(store: JobStore, home: Path) -> None:
    settings = WorkerSettings(threads=1, heartbeat_seconds=1.0, retry_base_seconds=0.0)
    Worker(store, LocalExecutor(), home, settings).run(until_idle=True)


@contextmanager
def _crashing(home: Path, point: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes started in the block crash there, once."""
    with monkeypatch.context() as patch:
        for name, value in crashing_at(point, home / "crashed").items():
            patch.setenv(name, value)
        yield


def _fingerprint(run: RunDir) -> str:
    """sha256 over the exported weights and the training history without wall-clock times."""
    digest = hashlib.sha256()
    for tensor in sorted(onnx.load(str(run.bundle / "model.onnx")).graph.initializer, key=lambda one: one.name):
        digest.update(tensor.name.encode() + numpy_helper.to_array(tensor).tobytes())
    for line in read_lines(run.metrics):
        kept = {key: value for key, value in line["values"].items() if key not in WALL_CLOCK and not key.startswith("cost/")}
        digest.update(json.dumps([line["step"], kept]).encode())
    return digest.hexdigest()


# ── the worker ────────────────────────────────────────────────────────────────────────────────────

COMMITS = {
    "the-claim": "in JobStore.claim",
    "the-first-heartbeat": "in JobStore.heartbeat",
    "the-last-heartbeat": "in JobStore.heartbeat once runs/*/outcome.json",
    "the-end": "in JobStore.finish",
}
WORKER_POINTS = [
    pytest.param(f"{when} commit jobs.db {where}", id=f"{when}-{name}", marks=marks)
    for name, where in COMMITS.items()
    for when in ("before", "after")
    for marks in [() if (when, name) in (("after", "the-claim"), ("before", "the-end")) else pytest.mark.slow]
]


@pytest.mark.parametrize("point", WORKER_POINTS)
@pytest.mark.longer
def test_a_worker_that_is_killed(point: str, tmp_path: Path) -> None:
    store = JobStore(open_database(tmp_path / "jobs.db"), lease_seconds=LEASE_SECONDS)
    job = submit(store, steps=3)
    script = Path(__file__).parents[1] / "job_standin.py"
    environment = {**os.environ, **crashing_at(point, tmp_path / "crashed")}
    with open(tmp_path / "worker.log", "wb") as log:
        settings = json.dumps({"heartbeat_seconds": LEASE_SECONDS})
        process = subprocess.Popen([sys.executable, script, tmp_path, settings], env=environment, stdout=log, stderr=log)
        wait(lambda: process.poll() is not None)
    assert process.returncode == -9, (tmp_path / "worker.log").read_text()
    end_leases(store)
    drive(worker(store, tmp_path), until=lambda: store.get(job.id).finished)
    run = RunDir(tmp_path / "runs" / job.id)
    done, trace = store.get(job.id), Trace.of(run)
    assert (done.state, done.result and done.result["state"]) == ("succeeded", result_of(3))
    assert (trace.completions, trace.overlaps) == (1, 0)
    kinds = [event.kind for event in store.events(job.id)]
    assert kinds.count("succeeded") == 1
    held = point not in ("before commit jobs.db in JobStore.claim", "after commit jobs.db in JobStore.finish")
    assert kinds.count("worker_lost") == held, "it died with the job in its hands"
    written = [line["kind"] for line in read_lines(run.events)]
    assert kinds.count("planned") == written.count("planned"), "what each attempt wrote is there once"
    with reading(store.engine) as connection:
        assert connection.execute(text("PRAGMA integrity_check")).scalar_one() == "ok"
