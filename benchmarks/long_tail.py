"""What each way of balancing classes gains in mean recall on a long tail of real photographs, from 500 images of a class to 10.

    python benchmarks/long_tail.py --data photos --out results/long_tail.json

``photos/train`` and ``photos/validation`` have class folders. The largest class keeps 500 images of train and the smallest 10,
on a geometric scale (1:50); val is cut from these. All other photographs are the test split. The same model is trained without
balancing, with each value of ``data.class_weights`` and with logit adjustment: as a solved head (``linear_probe``), and as a
head that takes steps on the frozen backbone (``partial`` with ``train: [head]``, without augmentation, so that the features of an
image are computed once for all runs), since ``sampling`` only changes steps. The
gain in mean recall over the run without balancing has the 95 % interval of a paired bootstrap over test images, drawn within
classes.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import finetune

LARGEST, SMALLEST = 500, 10
ROUNDS = 4000
WAYS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "balanced": {"data.class_weights": "balanced"},
    "effective_number": {"data.class_weights": "effective_number"},
    "sampling": {"data.class_weights": "sampling"},
    "logit_adjustment: 1": {"data.logit_adjustment": 1.0},
}
METHODS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "solved head": ("linear_probe", {}),
    "head by steps": ({"type": "partial", "train": ["head"]}, {"augmentation.policy": "none"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="class folders in train/ and validation/")
    parser.add_argument("--folder", type=Path, help="for the table and the workspace; default: a temporary one")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    table, sizes = tail(arguments.data.resolve(), folder)
    found: dict[str, Any] = {"train": sizes, "methods": {}}
    for name, (method, common) in METHODS.items():
        right: dict[str, NDArray[np.bool_]] = {}
        truth = np.empty(0, np.int64)
        for way, settings in WAYS.items():
            if name == "solved head" and way == "sampling":
                continue  # the same as balanced
            run = finetune.train(
                table, method=method, name="tail", settings={**common, **settings}, workspace=folder / "workspace", trackers=()
            )
            answers = run.predictions("test")
            truth = np.asarray(answers.labels)
            right[way] = answers.logits.argmax(axis=1) == truth
        found["methods"][name] = gains(right, truth)
        print(name, json.dumps(found["methods"][name], indent=2), flush=True)
        found["test"] = len(truth)
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=2) + "\n")


def tail(source: Path, folder: Path) -> tuple[Path, dict[str, int]]:
    """Write a table of the photographs with the split of each; return it, and the number of training images of each class."""
    files = {kind.name: sorted(kind.iterdir()) for kind in sorted((source / "train").iterdir()) if kind.is_dir()}
    names = sorted(files, key=lambda name: (-len(files[name]), name))
    wanted = np.geomspace(LARGEST, SMALLEST, len(names)).round().astype(int)
    rng, rows, sizes = np.random.default_rng(0), [], {}
    for name, count in zip(names, wanted, strict=True):
        chosen = rng.permutation(len(files[name]))[: min(count, len(files[name]) - 20)]
        sizes[name] = len(chosen)
        for number, file in enumerate(files[name]):
            # every sixth image of the tail chooses; the others train
            split = "test" if number not in chosen else "val" if list(chosen).index(number) % 6 == 5 else "train"
            rows.append((str(file), name, split))
        rows += [(str(file), name, "test") for file in sorted((source / "validation" / name).iterdir())]
    table = folder / "tail.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("file", "label", "split"), *rows])
    return table, sizes


def gains(right: Mapping[str, NDArray[np.bool_]], truth: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """Return for each way the mean recall, the accuracy, and the gain in mean recall over ``none`` with its interval."""
    classes = np.unique(truth)
    of_class = [np.flatnonzero(truth == label) for label in classes]
    rng = np.random.default_rng(1)
    drawn = [rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), ROUNDS) / len(rows) for rows in of_class]

    def recalls(values: NDArray[np.bool_]) -> NDArray[np.float64]:
        parts: Sequence[NDArray[np.float64]] = [
            weights @ values[rows].astype(np.float64) for weights, rows in zip(drawn, of_class, strict=True)
        ]
        return np.asarray(np.mean(parts, axis=0))

    base = recalls(right["none"])
    found = {}
    for way, values in right.items():
        mean = float(np.mean([values[rows].mean() for rows in of_class]))
        low, high = np.percentile(recalls(values) - base, [2.5, 97.5])
        gain = mean - float(np.mean([right["none"][rows].mean() for rows in of_class]))
        found[way] = {
            "mean_recall": round(mean, 4),
            "top1": round(float(values.mean()), 4),
            "gain": round(gain, 4),
            "low": round(float(low), 4),
            "high": round(float(high), 4),
        }
    return found


if __name__ == "__main__":
    main()
