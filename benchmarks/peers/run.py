"""Ours beside its peers: same files, split, backbone weights and cores, one after the other, each in fresh processes.

    python benchmarks/peers/run.py --data photos [--only ours-probe-cold fastai-frozen] [--repeats 3] [--out peers.json]

`photos` holds ``train`` and ``validation`` (or ``val``, ``valid``), each with a folder for every class. What is timed goes from
these files to a file with the class probabilities of every validation image; one scorer judges all of them. Results are merged
into ``--out``, so that a long comparison can be run in parts; a repeat that is run again replaces the one before. Offline, on the
CPU.

The peers' environment is made when an entry first needs it: ``.venv`` beside this file, from ``requirements.txt`` there.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from entries import HERE, PEERS_PYTHON, Data, Entry, Setting, all_entries, images_per_second, probabilities_of
from measure import CommandFailed, Cost, run_measured
from score import NotAnswered, score
from table import breakdown, comparison, training_speed

WORK = HERE / ".work"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
OUR_PACKAGES = ("torch", "timm", "onnxruntime", "numpy", "pillow", "mlflow")
PEER_PACKAGES = ("torch", "torchvision", "timm", "fastai", "scikit-learn", "numpy", "pillow")
# A setting of the calling shell must not decide who gets how many threads, or which BLAS kernels.
CLEARED = ("OMP_", "MKL_", "OPENBLAS_", "KMP_", "NUMEXPR_", "MALLOC_", "FINETUNE_", "MLFLOW_", "PYTHON")
TOUCHED_BYTES = 4 * 2**30
REPORTED = ("cost/wall_seconds", "cost/train_seconds", "val/top1", "val/loss")


def main() -> None:
    entries = all_entries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("FINETUNE_BENCH_DATA"), help="or $FINETUNE_BENCH_DATA")
    parser.add_argument("--only", nargs="+", choices=entries, metavar="ENTRY", default=list(entries), help=", ".join(entries))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores for everybody")
    parser.add_argument("--timeout", type=float, default=7200, metavar="SECONDS", help="for one process")
    parser.add_argument("--out", type=Path, default=Path("peers.json"))
    parser.add_argument("--table", action="store_true", help="only print what --out holds")
    given = parser.parse_args()
    if given.table:
        show(json.loads(given.out.read_text()), entries)
        return
    if given.data is None:
        parser.error("--data: give a folder with train and validation inside, or set FINETUNE_BENCH_DATA")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that whoever stops us stops what we have started
    with alone():
        compare(given, entries)


def compare(given: argparse.Namespace, entries: Mapping[str, Entry]) -> None:
    data = find_data(given.data)
    if any(entries[name].of_peer for name in given.only):
        prepare_peers()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])  # all children inherit it
    setting = {"machine": machine(given.threads), "data": describe(data)}
    results = read_results(given.out, setting)  # so that a mismatch is said at once
    warm_up(data)
    for repeat in range(given.repeats):
        # Another order in each repeat, so that nobody always runs after the same neighbour.
        for name in random.Random(repeat).sample(given.only, len(given.only)):
            print(f"{time.strftime('%H:%M:%S')} {name}, repeat {repeat} …", flush=True)
            measured = run_entry(entries[name], data, given.threads, repeat, given.timeout)
            print(f"         {json.dumps(measured)[:300]}", flush=True)
            results = read_results(given.out, setting) | {"versions": versions()}
            others = [run for run in results["runs"] if (run["entry"], run["repeat"]) != (name, repeat)]
            results["runs"] = [*others, measured]
            write_results(given.out, results)
    show(results, entries)


def run_entry(entry: Entry, data: Data, threads: int, repeat: int, timeout_seconds: float) -> dict[str, Any]:
    """One row of the results; a failure is one too."""
    out = WORK / "runs" / f"{entry.name}-{repeat}"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    setting = Setting(data, WORK / "backbone.safetensors", threads, repeat, out, WORK / "homes")
    row: dict[str, Any] = {"entry": entry.name, "repeat": repeat, "at": time.strftime("%Y-%m-%dT%H:%M:%S"), "commit": commit()}
    try:
        for command in entry.before(setting):
            run_measured(command.arguments, clean_environment() | command.environment, out / "before", timeout_seconds)
        row["load_average"] = os.getloadavg()[0]
        costs: dict[str, Cost] = {}
        for command in entry.commands(setting):
            environment = clean_environment() | command.environment
            costs[command.name] = run_measured(command.arguments, environment, out / command.name, timeout_seconds)
        row |= {
            "seconds": sum(cost.seconds for cost in costs.values()),
            "commands": {name: cost.seconds for name, cost in costs.items()},
            "commands_cpu": {name: cost.cpu_seconds for name, cost in costs.items()},
            "cpu_seconds": sum(cost.cpu_seconds for cost in costs.values()),
            "others_cpu_seconds": sum(cost.others_cpu_seconds for cost in costs.values()),
            "peak_bytes": max(cost.peak_bytes for cost in costs.values()),
        }
        if (steps := out / "steps.json").exists():
            row["steps"] = json.loads(steps.read_text())
        if speeds := images_per_second(out, entry.name):
            row["images_per_second"] = speeds
        if (outcome := out / "train.out").exists() and outcome.stat().st_size:
            document = json.loads(outcome.read_text())
            said = {**document["metrics"], **{f"cost/{name}": value for name, value in document["cost"].items()}}
            row["reported"] = {key: value for key, value in said.items() if key in REPORTED}
        if entry.scored:
            row |= asdict(score(data.val_files, *probabilities_of(out, data)))
    except (CommandFailed, NotAnswered, OSError, ValueError, KeyError) as failure:  # the last three: of what it handed in
        row["failed"] = f"{type(failure).__name__}: {failure}"
    return row


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait for any other comparison in this folder: two at once would measure each other."""
    WORK.mkdir(exist_ok=True)
    with open(WORK / ".lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def find_data(root: Path) -> Data:
    if not root.is_dir():
        raise SystemExit(f"{root}: no such folder")
    folders = {folder.name: folder for folder in root.resolve().iterdir() if folder.is_dir()}
    val = next((folders[name] for name in ("validation", "val", "valid") if name in folders), None)
    if "train" not in folders or val is None:
        raise SystemExit(f"{root}: needs the folders train and validation (or val, valid) inside, found {sorted(folders)[:8]}")
    train = folders["train"]
    classes = tuple(sorted(folder.name for folder in train.iterdir() if folder.is_dir()))
    return Data(train, val, classes, files_in(train), files_in(val))


def files_in(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.relative_to(folder).as_posix() for p in folder.glob("*/*") if p.suffix.lower() in IMAGE_SUFFIXES))


def describe(data: Data) -> dict[str, Any]:
    names = "\n".join((*data.train_files, "", *data.val_files))
    return {
        "name": data.train.parent.name,
        "classes": len(data.classes),
        "train_files": len(data.train_files),
        "validation_files": len(data.val_files),
        "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
    }


def machine(threads: int) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores_of_machine": os.cpu_count(),
        "threads": threads,
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "system": platform.system(),
    }


def versions() -> dict[str, dict[str, str]]:
    ask = "import importlib.metadata as m, json, sys; print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
    ours = {name: importlib.metadata.version(name) for name in OUR_PACKAGES}
    found = {"python": {"both": platform.python_version()}, "ours": ours}
    if not PEERS_PYTHON.exists():
        return found
    answer = subprocess.run([PEERS_PYTHON, "-c", ask, *PEER_PACKAGES], check=True, capture_output=True, text=True).stdout
    return {**found, "peers": json.loads(answer)}


def commit() -> str:
    """Of this repository; with a plus where the package has changes that are not committed."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, check=False, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "../../finetune") else "")


def prepare_peers() -> None:
    """The peers' environment and their weights, made when missing or when the requirements have changed."""
    requirements, done = HERE / "requirements.txt", HERE / ".venv" / ".installed"
    if not done.exists() or done.read_bytes() != requirements.read_bytes():
        print("installing the peers …", flush=True)
        if not PEERS_PYTHON.exists():
            subprocess.run([sys.executable, "-m", "venv", HERE / ".venv"], check=True)
        subprocess.run([PEERS_PYTHON, "-m", "pip", "install", "--quiet", "--requirement", requirements], check=True)
        done.write_bytes(requirements.read_bytes())
    if not (weights := WORK / "backbone.safetensors").exists():
        subprocess.run([PEERS_PYTHON, HERE / "convert_weights.py", weights], check=True, env=clean_environment())


def clean_environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(CLEARED)}
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def warm_up(data: Data) -> None:
    """Read every file and touch memory once: whoever comes first would pay for that, on a virtual machine dearly."""
    for folder, names in ((data.train, data.train_files), (data.val, data.val_files)):
        for name in names:
            (folder / name).read_bytes()
    np.ones(min(TOUCHED_BYTES, psutil.virtual_memory().available // 2), np.uint8)


def read_results(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """What is there already; results of another machine or of other data are not merged."""
    if not path.exists():
        return {**expected, "runs": []}
    results: dict[str, Any] = json.loads(path.read_text())
    for key, value in expected.items():
        if results[key] != value:
            raise SystemExit(f"{path} holds results of another {key}: {results[key]}, here {value}. Give another --out.")
    return results


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    temporary.replace(path)


def show(results: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    runs, what = results["runs"], {name: entry.what for name, entry in entries.items()}
    for table in (comparison(runs, what), training_speed(runs, what), breakdown(runs)):
        print("", *table, sep="\n")


if __name__ == "__main__":
    main()
