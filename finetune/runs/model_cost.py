"""What using an exported model costs: the size of its bundle, and the time of one answer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np

from finetune.bundle.predictor import Predictor
from finetune.storage.rundir import RunDir

LATENCY_ROUNDS = 20


def model_cost(run: RunDir) -> dict[str, float]:
    """Return what the exported model takes: bytes on disk, and seconds for one image on one core."""
    (latency,) = latencies([run])
    return {
        "bundle_bytes": float(sum(path.stat().st_size for path in run.bundle.iterdir())),
        "latency_seconds": latency,
    }


def latencies(runs: Sequence[RunDir]) -> list[float]:
    """Return the seconds that the exported model of each run takes for one image on one core: the median of some rounds.

    The models take turns, so that whatever else the machine does meets all of them.
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
