"""Commands that take milliseconds and keep the contract of the real ones: run folder, lock, lease, exit codes.

``python training_standin.py train REQUEST.yaml --run-dir FOLDER --json`` takes the steps that the request's ``metadata`` asks
for, with a checkpoint after each, and behaves as badly as it says. ``compare`` does the same with a child run in place of each
step. What was done is left in ``trace.jsonl`` in the run folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from processes import is_running

from finetune.events import Planned, Registered
from finetune.jobs.lease import watch_lease_from_environment
from finetune.storage.files import read_json, write_json
from finetune.storage.journal import append_line
from finetune.storage.rundir import RunBusy, RunDir

SEEN_VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "FINETUNE_HOME")


def next_state(state: str, step: int) -> str:
    """Every step depends on all before it, so that a lost or a repeated one shows in the result."""
    return hashlib.sha256(f"{state}{step}".encode()).hexdigest()


def carry_out(command: str, request: Path, run: RunDir) -> int:
    """Take the steps that are left; returns the exit code.

    The request's ``metadata`` (each value JSON) may say:
        step_seconds: how long a step takes.
        die_at: {step: signal or exit code} to end with before that step, each time it gets there.
        die_once_at: the same, but only in the first attempt that gets there.
        hang_at: the step before which it stops for good.
        hang_once_at: the same, but only in the first attempt that gets there.
        error: an error document to fail with, and its exit code under ``exit_code``.
        deaf: ignore SIGTERM.
        noisy: print so many lines.
        hoard_bytes: take so much memory in each step, and keep it.
    """
    asked = {key: json.loads(value) for key, value in yaml.safe_load(request.read_text())["metadata"].items()}
    if asked.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    watch_lease_from_environment()
    try:
        with run.held(), _alone(run):
            return _carry_out(command, run, asked)
    except RunBusy:
        return RunBusy.exit_code
    except KeyboardInterrupt:
        return 130


def _carry_out(command: str, run: RunDir, asked: Mapping[str, Any]) -> int:
    compares = command == "compare"
    if (run.comparison if compares else run.outcome).exists():
        return 0
    state, first = _newest_child(run) if compares else _newest_checkpoint(run)
    _trace(run, "start", step=first, environment={name: os.environ.get(name) for name in SEEN_VARIABLES})
    not_json: dict[str, Any] = {"loss": float("nan")}  # a journal must hold whatever a run has to say
    run.record(Planned(f"{asked['steps']} steps, from {first}", not_json, 0))
    for number in range(asked.get("noisy", 0)):
        sys.stdout.write(f"line {number}\n")
    hoard = []
    for step in range(first, asked["steps"]):
        hoard.append(b"x" * asked.get("hoard_bytes", 0))
        counts = {"phase": "training", "done": step, "total": asked["steps"], "unit": "steps"}
        write_json(run.progress, {**counts, "values": {}, "message": ""})
        if (code := _death(run, asked, step)) is not None:
            return code
        if asked.get("hang_at") == step or (asked.get("hang_once_at") == step and _first_time(run, f"hung-at-{step}")):
            while True:
                signal.pause()
        time.sleep(asked.get("step_seconds", 0.0))
        state = next_state(state, step)
        if compares:
            write_json(run.child(f"run-{step:04d}").create().outcome, {"state": state})
        else:
            _save(run, step + 1, state)
    if "error" in asked:
        write_json(run.error, asked["error"])
        return int(asked.get("exit_code", 1))
    _trace(run, "complete")
    if compares:
        write_json(run.comparison, {"verdict": {"sentence": "both are equal."}, "registered": "standin@1", "state": state})
        return 0
    write_json(run.outcome, {"model": "standin", "version": "1", "metrics": {"val/top1": 1.0}, "state": state})
    run.record(Registered("the run's own word for it", "standin", "1", {}))
    return 0


def _death(run: RunDir, asked: Mapping[str, Any], step: int) -> int | None:
    always, once = asked.get("die_at", {}).get(str(step)), asked.get("die_once_at", {}).get(str(step))
    if once is not None and _first_time(run, f"died-at-{step}"):
        always = once
    if always is not None and always < 0:
        os.kill(os.getpid(), -always)
    return always


def _first_time(run: RunDir, name: str) -> bool:
    marker = run.root / name
    first = not marker.exists()
    marker.touch()
    return first


def _save(run: RunDir, step: int, state: str) -> None:
    """As a real checkpoint: the file, then its checksum."""
    run.checkpoints.mkdir(exist_ok=True)
    write_json(run.checkpoints / f"step-{step:08d}.pt", {"state": state})
    write_json(run.checkpoints / f"step-{step:08d}.pt.sha256", "whole")


def _newest_checkpoint(run: RunDir) -> tuple[str, int]:
    whole = sorted(path for path in run.checkpoints.glob("step-*.sha256") if path.with_suffix("").exists())
    if not whole:
        return "", 0
    return str(read_json(whole[-1].with_suffix(""))["state"]), int(whole[-1].name[5:13])


def _newest_child(run: RunDir) -> tuple[str, int]:
    finished = sorted(run.root.glob("runs/*/outcome.json"))
    return (str(read_json(finished[-1])["state"]), len(finished)) if finished else ("", 0)


@contextmanager
def _alone(run: RunDir) -> Iterator[None]:
    """Note when another process is in the same run at the same time. Knows nothing of the run folder's lock."""
    for other in run.root.glob("alive-*"):
        if is_running(int(other.name.removeprefix("alive-"))):
            _trace(run, "overlap")
        else:
            other.unlink(missing_ok=True)
    mark = run.root / f"alive-{os.getpid()}"
    mark.touch()
    yield
    mark.unlink()


def _trace(run: RunDir, what: str, **data: Any) -> None:
    append_line(run.root / "trace.jsonl", {"what": what, "at": time.time(), **data})


if __name__ == "__main__":
    asked_command, request, flag, folder, as_json = sys.argv[1:]
    assert asked_command in ("train", "compare"), asked_command
    assert (flag, as_json) == ("--run-dir", "--json")
    sys.exit(carry_out(asked_command, Path(request), RunDir(Path(folder))))
