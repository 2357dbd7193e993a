"""`finetune` under a stopwatch: where the seconds of a command go, step by step.

    python ours_steps.py steps.json train --data photos

Wraps the functions named below, where they are called from, and counts each step's own time, without that of steps inside it.
Steps in several threads at once are each counted in full; "the rest" is wall time in which none of them ran.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

STARTED = psutil.Process().create_time()
STEPS = (
    ("listing the images", "finetune.runs.prepare", "index_dataset"),
    ("reading the files", "finetune.runs.prepare", "scan"),
    ("decoding and checking them, with the feature pass where there is one", "finetune.runs.prepare", "verify"),
    ("building the network", "finetune.runs.build", "build_backbone"),
    ("tracing and exporting the graph", "finetune.runs.build", "dry_run_export"),
    ("filling the graph with weights", "finetune.runs.build", "fold"),
    ("looking up features", "finetune.training.head", "pooled_features"),
    ("solving the head", "finetune.runs.solved", "solve_head"),
    ("hashing what is frozen", "finetune.runs.build", "frozen_digest"),
    ("answering val and test", "finetune.runs.run", "predict_splits"),
    ("evaluating the answers", "finetune.runs.run", "judge"),
    ("comparing with torch", "finetune.runs.build", "torch_reference"),
    ("bundle and parity", "finetune.runs.run", "export"),
    ("measuring latency", "finetune.runs.run", "model_cost"),
    ("report", "finetune.runs.run", "write_run_report"),
)


class Stopwatch:
    """Seconds by step, exclusive of steps inside."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.intervals: list[tuple[float, float]] = []
        self._inside = threading.local()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            stack: list[float] = self._inside.__dict__.setdefault("stack", [])
            stack.append(0.0)  # seconds of the steps inside
            began = time.time()
            try:
                return function(*args, **kwargs)
            finally:
                took, within = time.time() - began, stack.pop()
                self.seconds[name] = self.seconds.get(name, 0.0) + took - within
                if stack:
                    stack[-1] += took
                self.intervals.append((began, began + took))

        return wrapper

    def covered_seconds(self) -> float:
        """Wall time in which any step ran."""
        total, reached = 0.0, 0.0
        for began, ended in sorted(self.intervals):
            total += max(0.0, ended - max(began, reached))
            reached = max(reached, ended)
        return total


def wrap_steps(stopwatch: Stopwatch) -> list[str]:
    """Put the stopwatch around every step; the steps that are not where they used to be are returned."""
    missing = []
    for name, module, path in STEPS:
        *owners, attribute = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        if hasattr(owner, attribute):
            setattr(owner, attribute, stopwatch.timed(name, getattr(owner, attribute)))
        else:
            missing.append(f"{name} ({module}.{path})")
    return missing


def main() -> None:
    from finetune.cli import main as finetune

    stopwatch = Stopwatch()
    missing = wrap_steps(stopwatch)
    imported = time.time()
    target = Path(sys.argv[1])
    sys.argv = ["finetune", *sys.argv[2:]]
    try:
        finetune()
    finally:
        whole = time.time() - STARTED
        steps = {"starting and importing": imported - STARTED, **stopwatch.seconds}
        steps["the rest"] = whole - (imported - STARTED) - stopwatch.covered_seconds()
        if missing:
            print("not found, so counted elsewhere:", *missing, sep="\n  ", file=sys.stderr)
        target.write_text(json.dumps({**steps, "whole command": whole}, indent=2) + "\n")


if __name__ == "__main__":
    main()
