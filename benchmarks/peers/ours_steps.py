"""`finetune` under a stopwatch: where the seconds of a command go, step by step.

    python ours_steps.py steps.json train --data photos

Wraps the functions named below, where they are called from, and counts each step's own time, without that of steps inside it:
wall seconds, and CPU seconds of the thread that the step runs in. Steps in several threads at once are each counted in full;
"the rest" is wall time in which none of them ran. Modules that import torch are imported when the command imports them.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

STARTED = psutil.Process().create_time()
STEPS = (
    ("listing the images", "finetune.runs.prepare", "index_dataset"),
    ("reading the files", "finetune.runs.prepare", "scan"),
    ("decoding and checking them, with the feature pass where there is one", "finetune.runs.prepare", "verify"),
    ("importing torch and timm", "finetune.runs.prepare", "built_network"),
    ("looking up features", "finetune.training.head", "pooled_features"),
    ("comparing held-out with training images", "finetune.training.head", "_compare_with_training"),
    ("solving the head", "finetune.runs.solved", "solve_head"),
    ("predictions for val and test", "finetune.runs.run", "predict_splits"),
    ("evaluation, calibration, drift reference", "finetune.runs.run", "evaluate_splits"),
    ("evaluation, calibration, drift reference", "finetune.runs.run", "calibration_of"),
    ("evaluation, calibration, drift reference", "finetune.runs.run", "drift_reference"),
    ("bundle and its comparison with torch", "finetune.runs.run", "export"),
    ("measuring latency", "finetune.runs.run", "model_cost"),
    ("report", "finetune.runs.run", "write_run_report"),
)
OF_TORCH = (  # wrapped when the command has imported torch
    ("building the network", "finetune.runs.build", "build_network"),
    ("looking up the traced graph, or tracing it", "finetune.runs.build", "dry_run_export"),
    ("opening ONNX Runtime, compared with torch", "finetune.features.prefix", "open_engine"),
    ("hashing what is frozen", "finetune.runs.build", "frozen_digest"),
)


class Stopwatch:
    """Seconds by step, exclusive of steps inside."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.intervals: list[tuple[float, float]] = []
        self._inside = threading.local()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            stack: list[tuple[float, float]] = self._inside.__dict__.setdefault("stack", [])
            stack.append((0.0, 0.0))  # wall and CPU seconds of the steps inside
            began, cpu_began = time.time(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                took, cpu_took = time.time() - began, time.thread_time() - cpu_began
                within, cpu_within = stack.pop()
                self.seconds[name] = self.seconds.get(name, 0.0) + took - within
                self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + cpu_took - cpu_within
                if stack:
                    stack[-1] = (stack[-1][0] + took, stack[-1][1] + cpu_took)
                self.intervals.append((began, began + took))

        return wrapper

    def covered_seconds(self) -> float:
        """Wall time in which any step ran."""
        total, reached = 0.0, 0.0
        for began, ended in sorted(self.intervals):
            total += max(0.0, ended - max(began, reached))
            reached = max(reached, ended)
        return total


def wrap_steps(stopwatch: Stopwatch, steps: Sequence[tuple[str, str, str]]) -> list[str]:
    """Put the stopwatch around every step; the steps that are not where they used to be are returned."""
    missing = []
    for name, module, attribute in steps:
        owner = importlib.import_module(module)
        if hasattr(owner, attribute):
            setattr(owner, attribute, stopwatch.timed(name, getattr(owner, attribute)))
        else:
            missing.append(f"{name} ({module}.{attribute})")
    return missing


def wrap_steps_of_torch(stopwatch: Stopwatch, missing: list[str]) -> None:
    """Import torch and wrap the steps that need it at the first call of `built_network`, as the command does."""
    from finetune.runs import prepare
    from finetune.runtime.collector import importing

    original = prepare.built_network

    def built_network(*args: Any, **kwargs: Any) -> Any:
        with importing("torch"):
            missing.extend(wrap_steps(stopwatch, OF_TORCH))
        prepare.built_network = original
        return original(*args, **kwargs)

    prepare.built_network = built_network


def main() -> None:
    from finetune.cli import main as finetune

    stopwatch = Stopwatch()
    missing: list[str] = []
    wrap_steps_of_torch(stopwatch, missing)
    missing += wrap_steps(stopwatch, STEPS)
    imported, cpu_imported = time.time(), time.process_time()
    target = Path(sys.argv[1])
    sys.argv = ["finetune", *sys.argv[2:]]
    try:
        finetune()
    finally:
        whole = time.time() - STARTED
        steps = {"starting and importing": imported - STARTED, **stopwatch.seconds}
        steps["the rest"] = whole - (imported - STARTED) - stopwatch.covered_seconds()
        cpu = {"starting and importing": cpu_imported, **stopwatch.cpu_seconds, "whole command": time.process_time()}
        if missing:
            print("not found, so counted elsewhere:", *missing, sep="\n  ", file=sys.stderr)
        target.write_text(
            json.dumps({**steps, "whole command": whole, **{f"{name}, CPU": value for name, value in cpu.items()}}, indent=2)
            + "\n"
        )


if __name__ == "__main__":
    main()
