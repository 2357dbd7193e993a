"""Records of runs that never ran, for the rules of a diagnosis: a healthy one, and changes to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from answers import table

from finetune.evaluation import predictions as tables
from finetune.evaluation.diagnose import RunRecords
from finetune.evaluation.diagnose.records import Neighbour
from finetune.evaluation.predictions import Predictions
from finetune.storage.files import write_json
from finetune.storage.rundir import RunDir
from finetune.training.measurements import NEIGHBOURS_COLUMNS

CLASSES = ("ash", "elm", "oak", "yew")
N_STAGES, N_STEPS, EVERY = 6, 100, 20
WEIGHT_NORM, GRADIENT_NORM, RATIO = 10.0, 0.5, 1e-3


def answered(n: int, right: float, seed: int = 0, sureness: float = 4.0, prefix: str = "train") -> Predictions:
    """Answers to `n` images of all classes in turn, of which a share is right; the rest is answered with the next class."""
    labels = np.arange(n) % len(CLASSES)
    wrong = np.random.default_rng(seed).permutation(n) >= round(right * n)
    logits = np.zeros((n, len(CLASSES)), dtype=np.float32)
    logits[np.arange(n), (labels + wrong) % len(CLASSES)] = sureness
    found = table(logits, labels, CLASSES)
    return Predictions(**{**vars(found), "ids": tuple(f"{prefix}-{number}" for number in range(n))})


def journal(
    *,
    val: Sequence[tuple[float, float]] = ((0.6, 0.8), (0.4, 0.9), (0.3, 0.92), (0.3, 0.92), (0.3, 0.92), (0.3, 0.92)),
    gradients: Mapping[str, Sequence[float]] | None = None,
    ratios: Mapping[str, float] | None = None,
    dead: Mapping[str, tuple[float, float]] | None = None,
) -> list[dict[str, Any]]:
    """Return the lines of a journal.

    Args:
        val: loss and top-1 before the first epoch and after each.
        gradients: stage key -> gradient norm at each measured point; of the others 0.5.
        ratios: stage key -> step over weights; of the others 0.001.
        dead: stage key -> share of constant channels at the start and at the end.
    """
    lines: list[dict[str, Any]] = []
    for point, step in enumerate(range(0, N_STEPS, EVERY)):
        values = {}
        for stage in range(N_STAGES):
            key = f"stage{stage}"
            values[f"train/grad_norm/{key}"] = (gradients or {}).get(key, [GRADIENT_NORM] * 5)[point]
            values[f"train/weight_norm/{key}"] = WEIGHT_NORM
            values[f"train/update_ratio/{key}"] = (ratios or {}).get(key, RATIO)
        lines.append({"step": step, "epoch": None, "values": values})
    for epoch, (loss, top1) in enumerate(val):
        step = epoch * N_STEPS // (len(val) - 1)
        values = {"val/loss": loss, "val/top1": top1} | ({"train/loss": 1 / epoch} if epoch else {})
        lines.append({"step": step, "epoch": float(epoch), "values": values})
    for step, position in ((0, 0), (N_STEPS, 1)):
        shares = {f"train/dead_channels/{stage}": pair[position] for stage, pair in (dead or {"stage0": (0.0, 0.0)}).items()}
        lines.append({"step": step, "epoch": None, "values": shares})
    return lines


def resolved(
    *, solved: bool = True, pretrained: bool = True, rate: float = 1e-3, n_steps: int = N_STEPS, n_train: int = 400
) -> dict[str, Any]:
    stages = range(N_STAGES)
    return {
        "task": "multiclass",
        "backbone": {
            "stages": [{"index": index, "name": f"blocks.{index}", "n_parameters": 1000} for index in stages],
            "weights": {"source": "package" if pretrained else "none"},
        },
        "dataset": {"sizes": {"train": n_train, "val": 200, "test": 200}, "classes": list(CLASSES), "counts": {"train": {}}},
        "recipe": {
            "phases": [
                {
                    "solved": solved,
                    "n_steps": n_steps,
                    "head_lr": rate,
                    "stage_lr": {str(index): rate for index in stages} if n_steps else {},
                    "trainable": list(stages) if n_steps else [],
                }
            ]
        },
    }


def run_records(**given: Any) -> RunRecords:
    """Return the records of a healthy run of full fine-tuning from a solved head, with changes."""
    values: dict[str, Any] = {
        "run": RunDir(Path("some-run")),
        "resolved": resolved(),
        "lines": journal(),
        "samples": {0: answered(200, 0.9, sureness=2.0), N_STEPS: answered(200, 0.98)},
        "held_out": {split: answered(200, 0.92, seed=1, prefix=split) for split in ("val", "test")},
        "neighbours": neighbours(0),
        "preprocessing": None,
        "outcome": {"frozen": {"stages": [], "digest_before": "a", "digest_after": "a"}},
        "error": None,
    }
    return RunRecords(**{**values, **given})


def neighbours(n_twins: int, n: int = 200) -> list[Neighbour]:
    ratios = [0.05] * n_twins + [0.8] * (n - n_twins)
    return [Neighbour("val", f"val-{number}", "ash", f"train-{number}", "ash", ratio) for number, ratio in enumerate(ratios)]


def measured_preprocessing(gain: float | None, left_out: tuple[float, float, float] | None = None) -> dict[str, Any]:
    """Return what was measured of BGR: the gain of statistics; own share, other share and standard errors of left-out images."""
    other: dict[str, Any] = {
        "name": "BGR from -1 to 1",
        "statistics": None if gain is None else {"gain": gain, "z": 10.0 * gain},
        "left_out": None if left_out is None else dict(zip(("own_top1", "top1", "z"), left_out, strict=True)) | {"n": 288},
    }
    return {"own": {"name": "RGB from -1 to 1", "n": 288}, "others": [other]}


def write_run(folder: Path, records: RunRecords) -> RunDir:
    """Write records as the folder of a run, from which the same records are read."""
    run = RunDir(folder).create()
    write_json(run.resolved, dict(records.resolved))
    for line in records.lines:
        run.metric(line["step"], line["values"], epoch=line["epoch"])
    for step, answers in records.samples.items():
        tables.write(run.train_sample_at(step), answers)
    for split, answers in records.held_out.items():
        tables.write(run.predictions_of(split), answers)
    rows = [",".join(NEIGHBOURS_COLUMNS)]
    rows += [f"{one.split},{one.id},{one.label},{one.nearest},{one.nearest_label},{one.ratio}" for one in records.neighbours]
    run.neighbours.parent.mkdir(exist_ok=True)
    run.neighbours.write_text("\n".join(rows) + "\n")
    if records.preprocessing is not None:
        write_json(run.preprocessing, dict(records.preprocessing))
    if records.outcome is not None:
        write_json(run.outcome, dict(records.outcome))
    return run
