"""What `finetune study labels` foresees from half of some labelled photographs, against what the whole gave.

    python benchmarks/learning_curve.py photos [--seeds 20] [--truths 24]

Every seed draws another half of the images and measures its learning curve as the command does. What twice its training images
would bring is foreseen, and compared with what they bring: heads solved on so many images of the whole, averaged over many
divisions. Counts how often the 95 % interval holds that. Features are computed once. Writes JSON and prints a table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.features.rows import FeatureContext, Views, pooled_features
from finetune.features.softmax_head import solve_softmax_head
from finetune.metrics.accuracy import MEAN_PER_CLASS_ACCURACY, TOP1
from finetune.runs.prepare import framing, read_and_build, split_for
from finetune.runs.shared import Shared
from finetune.spec import parse_spec
from finetune.storage.workspace import Workspace
from finetune.studies.labels.curve import nested
from finetune.studies.labels.study import HELD_OUT, measured

Rows = NDArray[np.float32]
Labels = NDArray[np.int64]


def true_errors(rows: Rows, labels: Labels, n_classes: int, sizes: tuple[int, int], seed: int) -> NDArray[np.float64]:
    """Return top-1 and per-class error after training on each size, (2 sizes, 2 metrics)."""
    rng = np.random.default_rng([seed, 9])
    order = rng.permutation(len(labels))
    held_out, train = np.split(order, [round(HELD_OUT * len(order))])
    found = []
    for chosen in nested(labels[train], sizes, rng):
        head = solve_softmax_head(rows[train[chosen]], labels[train[chosen]], n_classes, folds=3)
        right = head.logits(rows[held_out]).argmax(axis=1) == labels[held_out]
        found.append([1 - right.mean(), 1 - np.mean([right[labels[held_out] == one].mean() for one in np.unique(labels)])])
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--truths", type=int, default=24, help="divisions over which the truth is averaged")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "learning_curve.json")
    args = parser.parse_args()
    spec, shared = parse_spec({"training_file": str(args.data)}), Shared.of(Workspace.from_environment())
    dataset, network = read_and_build(spec, shared)
    views = Views(framing(spec, split_for(spec, dataset, None), network.facts.preprocess))
    rows = np.asarray(pooled_features(network.prefix, dataset.samples, views, FeatureContext(shared.store)))
    samples: tuple[Sample, ...] = dataset.samples
    labels, n_classes = np.array([sample.labels[0] for sample in samples]), len(dataset.classes)
    whole = len(labels) - round(HELD_OUT * len(labels))
    errors = np.array([true_errors(rows, labels, n_classes, (whole // 2, whole), seed) for seed in range(args.truths)])
    gains = errors[:, 0] - errors[:, 1]  # (truths, 2 metrics)
    document: dict[str, object] = {"images": len(labels), "classes": n_classes, "n_train": [whole // 2, whole]}
    predictions: dict[str, list[list[float]]] = {TOP1.key: [], MEAN_PER_CLASS_ACCURACY.key: []}
    for seed in range(args.seeds):
        half = np.random.default_rng([seed, 5]).permutation(len(labels))[: len(labels) // 2]
        curves = measured(rows[half], [samples[one] for one in half], n_classes, seed)
        assert curves is not None
        for name, curve in curves.items():
            gain = curve.gain(whole // 2, whole)
            predictions[name].append([gain.value, gain.low, gain.high])
    for position, (name, of_metric) in enumerate(predictions.items()):
        table, truth = np.array(of_metric), float(gains[:, position].mean())
        held = int(((table[:, 1] <= truth) & (truth <= table[:, 2])).sum())
        document[name] = {
            "truth": round(truth, 5),
            "truth_standard_error": round(float(gains[:, position].std(ddof=1) / np.sqrt(args.truths)), 5),
            "errors": [round(float(one), 5) for one in errors[:, :, position].mean(axis=0)],
            "predictions": [[round(float(one), 5) for one in line] for line in of_metric],
            "intervals_that_hold_it": held,
        }
        print(
            f"{name}: {100 * truth:+.2f} points; foreseen {100 * table[:, 0].mean():+.2f} on average, intervals on average "
            f"{100 * table[:, 1].mean():.2f} to {100 * table[:, 2].mean():.2f}; {held} of {args.seeds} hold it"
        )
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
