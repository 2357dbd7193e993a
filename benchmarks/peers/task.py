"""What every peer is asked to do, and how it hands in: probabilities of the validation files, and what its steps took.

Runs in the peers' environment. Scoring is not done here: one scorer does it for everybody.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BACKBONE = "tf_efficientnet_lite0"


@dataclass(frozen=True)
class Task:
    """Class folders to learn from, class folders to judge, and where the answer goes."""

    train: Path
    val: Path
    weights: Path  # of `BACKBONE`, under timm's names
    seed: int
    threads: int
    out: Path

    @property
    def pretrained(self) -> dict[str, Any]:
        """What makes timm, and whoever calls timm, load these weights as its own pretrained ones."""
        return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(self.weights), "mean": (0.5,) * 3, "std": (0.5,) * 3}}

    def hand_in(
        self,
        files: Sequence[Path],
        classes: Sequence[str],
        probs: np.ndarray,
        steps: dict[str, float],
        images_per_second: dict[str, float] | None = None,
    ) -> None:
        """`probs` is (N, C), a row for each file and a column for each class; the speed is of training, by what trained."""
        names = [Path(file).resolve().relative_to(self.val.resolve()).as_posix() for file in files]
        np.savez(self.out / "probabilities.npz", files=names, classes=list(classes), probs=np.asarray(probs, np.float32))
        (self.out / "steps.json").write_text(json.dumps(steps, indent=2) + "\n")
        (self.out / "images_per_second.json").write_text(json.dumps(images_per_second or {}, indent=2) + "\n")


def read_task(parser: argparse.ArgumentParser | None = None) -> tuple[Task, argparse.Namespace]:
    """The task on the command line, and whatever else `parser` knows of."""
    parser = parser or argparse.ArgumentParser()
    for name in ("train", "val", "weights", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    return Task(given.train, given.val, given.weights, given.seed, given.threads, given.out), given


@contextmanager
def timing(steps: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block to ``steps[name]``."""
    began = time.perf_counter()
    yield
    steps[name] = steps.get(name, 0.0) + time.perf_counter() - began
