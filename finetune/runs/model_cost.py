"""Measure the cost of using an exported model: the size of its bundle and its latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np

from finetune.bundle.predictor import Predictor
from finetune.storage.rundir import RunDir

LATENCY_ROUNDS = 20


def model_cost(run: RunDir) -> dict[str, float]:
    """Return ``bundle_bytes`` on disk and ``latency_seconds`` for one image on one core."""
    (latency,) = latencies([run])
    return {
        "bundle_bytes": float(sum(path.stat().st_size for path in run.bundle.iterdir())),
        "latency_seconds": latency,
    }


def latencies(runs: Sequence[RunDir]) -> list[float]:
    """Return for each run the seconds that its exported model takes for one image on one core, the median of `LATENCY_ROUNDS`.

    The models are measured in turn, so that other load on the machine affects all of them alike.
    """
    predictors = [Predictor.load(run.bundle) for run in runs]
    images = [np.zeros((1, *predictor.manifest.preprocess.input_size_px, 3), np.uint8) for predictor in predictors]
    rounds: list[list[float]] = []
    for _ in range(LATENCY_ROUNDS):
        rounds.append([])
        for predictor, image in zip(predictors, images, strict=True):
            started = time.perf_counter()
            predictor.run(image)
            rounds[-1].append(time.perf_counter() - started)
    return [statistics.median(of_model) for of_model in zip(*rounds, strict=True)]
