"""Kill workers and training processes at random while real jobs run, and count what was lost, doubled, overlapped or changed.

    python benchmarks/job_chaos.py --jobs 40 --kills 100 --out job_chaos.json

Every job is the real thing (`finetune train` on generated pictures, a tiny timm network, MLflow on), under workers with leases
of some seconds. Each of a few specs is first run once by itself; every job's exported weights and training history must then be
equal to those, bit for bit, however often it was killed. Linux only: who overlaps whom is read from /proc, not from our locks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from PIL import Image
from sqlalchemy import select

from finetune.bundle.registry import Registry
from finetune.executors.local import LocalExecutor
from finetune.jobs.database import open_database, reading
from finetune.jobs.schema import UNFINISHED
from finetune.jobs.schema import jobs as jobs_table
from finetune.jobs.store import JobStore
from finetune.jobs.worker import Worker, WorkerSettings
from finetune.spec import JobSpec, parse_spec
from finetune.storage.journal import read_lines
from finetune.storage.rundir import RunDir

LEASE_SECONDS, BEAT_SECONDS = 10.0, 2.0
CLASSES, IMAGES_A_CLASS = 3, 14
SPECS = 5
EPOCHS = 38  # most of a job is training, in fewer steps than those from which a run chooses its memory layout by the clock
WALL_CLOCK = ("train/images_per_second", "head/seconds")
MOST_STALLED = 2  # a third death without a new checkpoint in between would end the job, as it should


def write_pictures(folder: Path) -> None:
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(IMAGES_A_CLASS):
            pixels = np.random.default_rng([label, number]).integers(0, 120, (72, 80, 3), dtype=np.uint8)
            pixels[:, :: label + 2, label] += 100
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")


def spec_of(pictures: Path, seed: int, epochs: int, name: str) -> JobSpec:
    return parse_spec(
        {
            "training_file": str(pictures),
            "suffix": name,
            "seed": seed,
            "model": {"backbone": "test_resnet", "weights": "none", "input_size_px": 64},
            "method": {"type": "full", "bn": "train"},
            "hyperparameters": {"n_epochs": epochs, "batch_size": 6, "mixup": 0.2, "ema": True, "early_stopping_epochs": None},
            "compute": {"device": "cpu", "precision": "float32", "threads": 1},
            "export": {"register_model": "always"},  # what is tested is that nothing is lost, not what was learnt
        }
    )


def fingerprint(run: RunDir) -> str:
    """sha256 over the exported weights and the training history without wall-clock times."""
    digest = hashlib.sha256()
    graph = onnx.load(str(run.bundle / "model.onnx")).graph
    for tensor in sorted(graph.initializer, key=lambda one: one.name):
        digest.update(tensor.name.encode() + numpy_helper.to_array(tensor).tobytes())
    for line in read_lines(run.metrics):
        kept = {key: value for key, value in line["values"].items() if key not in WALL_CLOCK and not key.startswith("cost/")}
        digest.update(json.dumps([line["step"], kept]).encode())
    return digest.hexdigest()


def train_alone(spec: JobSpec, run: RunDir, home: Path) -> float:
    """One uninterrupted run, as a person would start it; returns its wall seconds."""
    run.create()
    (run.root / "request.yaml").write_text(spec.to_yaml())
    began = time.monotonic()
    command = [sys.executable, "-m", "finetune", "train", str(run.root / "request.yaml"), "--run-dir", str(run.root), "--json"]
    subprocess.run(command, check=True, env={**os.environ, "FINETUNE_HOME": str(home)}, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def work(home: Path) -> None:
    """A worker as `finetune worker` is, but with short leases."""
    store = JobStore(open_database(home / "jobs.db"), lease_seconds=LEASE_SECONDS)
    Worker(store, LocalExecutor(), home, WorkerSettings(threads=1, heartbeat_seconds=BEAT_SECONDS, retry_base_seconds=0.5)).run()


@dataclass
class Fleet:
    """Some worker processes, each started anew when it dies."""

    home: Path
    size: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def keep(self) -> None:
        for slot in range(self.size):
            if slot == len(self.processes):
                self.processes.append(self._start())
            elif self.processes[slot].poll() is not None:
                self.processes[slot] = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with open(self.home / "workers.log", "ab") as log:
            return subprocess.Popen([sys.executable, __file__, "--work", str(self.home)], stdout=log, stderr=log)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(60)


@dataclass(frozen=True)
class Training:
    """A living ``finetune train`` process of this workspace."""

    pid: int
    parent: int
    job_id: str


def training_processes(home: Path) -> list[Training]:
    """Those that a worker started. What one of them forks looks like it until it becomes another program, and is left out."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines() if ":\t" in line)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if (
            b"train" in arguments
            and b"finetune.executors.process_parent" not in arguments
            and not status["State"].startswith("Z")
        ):
            run = next((Path(part.decode()) for part in arguments if part.startswith(os.fsencode(home / "runs"))), None)
            if run is not None:
                job_id = run.parent.name if run.suffix else run.name
                found.append(Training(int(folder.name), int(status["PPid"]), job_id))
    own = {(process.pid, process.job_id) for process in found}
    return [process for process in found if (process.parent, process.job_id) not in own]


@contextmanager
def watching_for_overlaps(home: Path, overlaps: dict[str, str]) -> Iterator[None]:
    """Look at /proc all the time; two living processes of one job are an overlap, noted by job with what was seen."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            seen = training_processes(home)
            for job_id, count in Counter(process.job_id for process in seen).items():
                if count > 1:
                    overlaps.setdefault(job_id, str([process for process in seen if process.job_id == job_id]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def kill_one(fleet: Fleet, store: JobStore, chance: random.Random) -> dict[str, Any] | None:
    """SIGKILL a worker or a training process; None where there is none to kill."""
    training = {process.pid: process.job_id for process in training_processes(fleet.home)}
    if chance.random() < 0.5:
        busy = [process for process in fleet.processes if process.poll() is None]
        if not training or not busy:
            return None
        victim = chance.choice(busy)
        victim.kill()
        return {"what": "worker", "training": len(training)}
    with reading(store.engine) as connection:
        rows = connection.execute(select(jobs_table.c.id, jobs_table.c.stalled_attempts))
        stalled = {str(job_id): int(count) for job_id, count in rows}
    killable = sorted(pid for pid, job_id in training.items() if stalled[job_id] < MOST_STALLED)
    if not killable:
        return None
    midway = [pid for pid in killable if _checkpoints(fleet.home, training[pid])]  # they are the interesting ones
    pid = chance.choice(midway or killable)
    steps = _checkpoints(fleet.home, training[pid])
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return None
    return {"what": "training", "job": training[pid], "newest_checkpoint": steps[-1] if steps else None}


def _checkpoints(home: Path, job_id: str) -> list[str]:
    return sorted(path.name for path in (home / "runs" / job_id / "checkpoints").glob("step-*.sha256"))


def judge(home: Path, store: JobStore, made: Mapping[str, int], reference: Mapping[int, str]) -> dict[str, Any]:
    """What became of the jobs. `made`: job id → its spec's number."""
    ended = {job_id: store.get(job_id) for job_id in made}
    ends = {
        job_id: [event.kind for event in store.events(job_id) if event.kind in ("succeeded", "failed", "cancelled")]
        for job_id in made
    }
    versions = Counter(version.name for version in Registry(home / "models").list())
    resumed: dict[str, list[int]] = {}
    for job_id in made:
        lines = read_lines(RunDir(home / "runs" / job_id).events)
        last = max((line["step"] for line in read_lines(RunDir(home / "runs" / job_id).metrics)), default=0)
        resumed[job_id] = [line["step"] for line in lines if line["kind"] == "resumed" and 0 < line["step"] < last]
    equal = {
        job_id: fingerprint(RunDir(home / "runs" / job_id)) == reference[number]
        for job_id, number in made.items()
        if ended[job_id].state == "succeeded"
    }
    seconds = [event.data for job_id in made for event in store.events(job_id) if event.kind == "worker_lost"]
    return {
        "jobs": len(made),
        "states": dict(Counter(job.state for job in ended.values())),
        "lost": sum(job.state != "succeeded" for job in ended.values()),
        "ended_twice": sum(len(found) != 1 for found in ends.values()),
        "registered_twice": sum(versions[f"chaos-{number}"] != 1 for number in range(len(made))),
        "attempts": sum(job.attempts for job in ended.values()),
        "workers_lost": len(seconds),
        "resumed_mid_training": sum(bool(steps) for steps in resumed.values()),
        "resumes_mid_training": sum(map(len, resumed.values())),
        "resumed_and_bit_identical": sum(equal.get(job_id, False) for job_id, steps in resumed.items() if steps),
        "bit_identical": sum(equal.values()),
        "different": sorted(job_id for job_id, same in equal.items() if not same),
        "errors": [f"{job_id}: {job.error_code}: {job.error_message}" for job_id, job in ended.items() if job.error_code],
    }


def run_chaos(home: Path, n_jobs: int, n_kills: int, workers: int, epochs: int, seed: int) -> dict[str, Any]:
    pictures = home / "pictures"
    write_pictures(pictures)
    reference: dict[int, str] = {}
    alone = []
    for number in range(SPECS):
        run = RunDir(home / "alone" / str(number))
        alone.append(train_alone(spec_of(pictures, number, epochs, "alone"), run, home / "alone"))
        reference[number] = fingerprint(run)
        print(f"alone {number}: {alone[-1]:.1f} s, {reference[number][:16]}", flush=True)
    assert len(set(reference.values())) == SPECS, "the fingerprint tells specs apart"
    store = JobStore(open_database(home / "jobs.db"), lease_seconds=LEASE_SECONDS)
    made: dict[str, int] = {}

    def queue_one() -> None:
        number = len(made)
        spec = spec_of(pictures, number % SPECS, epochs, f"chaos-{number}")
        job, _ = store.create("chaos", spec.model_dump(mode="json"), spec_digest=spec.digest(), suffix=spec.suffix)
        made[job.id] = number % SPECS

    for _ in range(n_jobs):
        queue_one()
    chance = random.Random(seed)
    kills, overlaps = [], dict[str, str]()
    began = time.monotonic()
    pause = 1.1 * float(np.median(alone)) / workers  # so that many attempts die about half way
    next_kill = began + chance.uniform(0, pause)
    with watching_for_overlaps(home, overlaps), Fleet(home, workers) as fleet:
        while len(kills) < n_kills or store.counts().keys() & set(UNFINISHED):
            fleet.keep()
            if len(kills) < n_kills and store.counts().get("queued", 0) < workers:
                queue_one()  # "at least" so many jobs: there is something to kill until the last kill
            time.sleep(0.05)
            if time.monotonic() >= next_kill and len(kills) < n_kills and (kill := kill_one(fleet, store, chance)):
                kills.append({"at": round(time.monotonic() - began, 2), **kill})
                next_kill = time.monotonic() + chance.uniform(0, pause)
                if len(kills) % 10 == 0:
                    print(f"{kills[-1]['at']:7.1f} s: {len(kills)} kills, {store.counts()}", flush=True)
    return {
        "kills": len(kills),
        "kills_of": dict(Counter(kill["what"] for kill in kills)),
        **judge(home, store, made, reference),
        "overlapping": len(overlaps),
        "wall_seconds": round(time.monotonic() - began, 1),
        "seconds_alone": [round(seconds, 1) for seconds in alone],
        "worker_exit_codes": [process.returncode for process in fleet.processes],
        "settings": {"workers": workers, "lease_seconds": LEASE_SECONDS, "epochs": epochs, "seed": seed},
        "overlap_log": overlaps,
        "kill_log": kills,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="more are measured first, and may compute otherwise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, help="an empty folder to keep (default: a temporary one)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="job-chaos-") as temporary:
        home = (given.home or Path(temporary)).absolute()
        report = run_chaos(home, given.jobs, given.kills, given.workers, given.epochs, given.seed)
    if given.out:
        given.out.write_text(json.dumps(report, indent=2) + "\n")
    for name, value in report.items():
        if not name.endswith("_log"):
            print(f"{name:28} {value}")
    wrong = report["lost"] or report["ended_twice"] or report["registered_twice"] or report["overlapping"] or report["different"]
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
