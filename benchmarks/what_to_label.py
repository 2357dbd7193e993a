"""What `finetune suggest` gains over labelling at random: active learning simulated on labelled photographs from cached features.

    python benchmarks/what_to_label.py photos [--seeds 24] [--rounds 3] [--add 100] [--start 10]

Every seed draws a test set and a few labelled images of each class. Then, round by round, each way of choosing adds images to
its own labelled set, and a linear head is solved on it. All ways of a seed have the same test set and the same first images, so
differences are paired; the interval is over seeds. Features are computed once. Writes JSON and prints a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.features.rows import FeatureContext, Views, pooled_features
from finetune.features.softmax_head import solve_softmax_head
from finetune.features.solve import SolvedHead
from finetune.labelling.choose import choose, margins
from finetune.metrics.rows import log_softmax
from finetune.runs.prepare import framing, read_and_build, split_for
from finetune.runs.shared import Shared
from finetune.spec import parse_spec
from finetune.storage.workspace import Workspace

Floats = NDArray[np.floating]
Choose = Callable[[Floats, Floats, int, np.random.Generator], NDArray[np.int64]]

WAYS: Mapping[str, Choose] = {
    "at random": lambda probs, embeddings, n, rng: rng.choice(len(probs), n, replace=False),
    "least margin": lambda probs, embeddings, n, rng: np.argsort(margins(probs), kind="stable")[:n],
    "clusters": lambda probs, embeddings, n, rng: choose(np.ones(len(probs)), embeddings, n, int(rng.integers(2**31))),
    "suggest": lambda probs, embeddings, n, rng: choose(1 - margins(probs), embeddings, n, int(rng.integers(2**31))),
}


def features(data: Path) -> tuple[Floats, NDArray[np.int64], int]:
    """Return embeddings (N, D) by the default backbone, labels (N,) and the number of classes."""
    spec, shared = parse_spec({"training_file": str(data)}), Shared.of(Workspace.from_environment())
    dataset, network = read_and_build(spec, shared)
    dataset = split_for(spec, dataset, None)
    views = Views(framing(spec, dataset, network.facts.preprocess))
    rows = pooled_features(network.prefix, dataset.samples, views, FeatureContext(shared.store))
    return np.asarray(rows), np.array([sample.labels[0] for sample in dataset.samples]), len(dataset.classes)


def judged(head: SolvedHead, rows: Floats, labels: NDArray[np.int64]) -> tuple[float, float]:
    """Return top-1 accuracy and its mean over classes."""
    right = head.logits(rows).argmax(axis=1) == labels
    return float(right.mean()), float(np.mean([right[labels == one].mean() for one in np.unique(labels)]))


def simulate(
    rows: Floats, labels: NDArray[np.int64], n_classes: int, seed: int, args: argparse.Namespace
) -> dict[str, list[tuple[float, float]]]:
    """Return for each way the figures after each round."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    test, pool = order[: len(order) // 4], order[len(order) // 4 :]
    start = np.concatenate([pool[labels[pool] == one][: args.start] for one in range(n_classes)])
    first = solve_softmax_head(rows[start], labels[start], n_classes)
    found = {}
    for way, chosen_by in WAYS.items():
        labelled, head, figures = start, first, [judged(first, rows[test], labels[test])]
        of_way = np.random.default_rng([seed, 1])
        for _ in range(args.rounds):
            left = np.setdiff1d(pool, labelled)
            probs = np.exp(log_softmax(head.logits(rows[left]).astype(np.float64)))
            labelled = np.concatenate([labelled, left[chosen_by(probs, rows[left], args.add, of_way)]])
            head = solve_softmax_head(rows[labelled], labels[labelled], n_classes)
            figures.append(judged(head, rows[test], labels[test]))
        found[way] = figures
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--add", type=int, default=100)
    parser.add_argument("--start", type=int, default=10, help="labelled images of each class at first")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "what_to_label.json")
    args = parser.parse_args()
    rows, labels, n_classes = features(args.data)
    runs = [simulate(rows, labels, n_classes, seed, args) for seed in range(args.seeds)]
    figures = {way: np.array([run[way] for run in runs]) for way in WAYS}  # (seeds, rounds + 1, 2)
    document = {
        "images": len(labels),
        "classes": n_classes,
        "seeds": args.seeds,
        "start": args.start,
        "add": args.add,
        "ways": {},
    }
    for way, of_way in figures.items():
        difference = of_way - figures["at random"]
        halves = 1.96 * difference.std(axis=0, ddof=1) / np.sqrt(args.seeds)
        document["ways"][way] = [
            {
                "labels": args.start * n_classes + number * args.add,
                "top1": round(float(of_way[:, number, 0].mean()), 4),
                "mean_per_class": round(float(of_way[:, number, 1].mean()), 4),
                "top1_over_random": [round(float(x), 4) for x in _interval(difference[:, number, 0].mean(), halves[number, 0])],
                "mean_per_class_over_random": [
                    round(float(x), 4) for x in _interval(difference[:, number, 1].mean(), halves[number, 1])
                ],
            }
            for number in range(args.rounds + 1)
        ]
        for line in document["ways"][way][1:]:
            gain, macro = line["top1_over_random"], line["mean_per_class_over_random"]
            print(
                f"{way:12s} {line['labels']:5d} labels  top-1 {line['top1']:.3f} ({100 * gain[0]:+.1f}, {100 * gain[1]:+.1f} to "
                f"{100 * gain[2]:+.1f})  per class {line['mean_per_class']:.3f} ({100 * macro[0]:+.1f}, {100 * macro[1]:+.1f} to "
                f"{100 * macro[2]:+.1f})"
            )
    args.out.write_text(json.dumps(document, indent=1) + "\n")


def _interval(mean: float, half: float) -> tuple[float, float, float]:
    return mean, mean - half, mean + half


if __name__ == "__main__":
    main()
