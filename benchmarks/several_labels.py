"""With several labels per image: the planted wrong labels that `finetune check` finds, and what `finetune suggest` gains.

    python benchmarks/several_labels.py photos/train [--seeds 3] [--suggest-seeds 12]

A photograph of clothes has its class folder as a label, and what is measured in its pixels (dark or light, and its hue), as in
``multilabel.py``. Wrong labels are planted in 5 % of the images, in three ways: ``any`` drops, adds or replaces a label, with
equal chances; ``replaced`` replaces one by another that is drawn by frequency; ``dropped`` drops one. Found are those whose
images are in the first tenth of the ranking by `finetune.doctor.labels`. Then images are chosen to be labelled as in
``what_to_label.py``, and judged by the mean average precision on a quarter of the images. Features are computed once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from multilabel import seen_in_pixels
from numpy.typing import NDArray

from finetune.data.dataset import Sample
from finetune.doctor.labels import doubt_label_sets
from finetune.features.rows import FeatureContext, Views, pooled_features
from finetune.features.sigmoid_head import solve_sigmoid_head
from finetune.labelling.choose import choose, label_uncertainty
from finetune.metrics.labels import label_results, mean_average_precision, sigmoid
from finetune.runs.prepare import framing, read_and_build, split_for
from finetune.runs.shared import Shared
from finetune.spec import parse_spec
from finetune.storage.workspace import Workspace
from finetune.tasks import task_named

SHARE = 0.05  # of images with a planted wrong label
ROUNDS, ADD, START = 3, 100, 100
PLANTERS = ("any", "replaced", "dropped")
WAYS = ("at random", "suggest")

Floats = NDArray[np.float32]
Targets = NDArray[np.bool_]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="class folders")
    parser.add_argument("--seeds", type=int, default=3, help="of planted labels")
    parser.add_argument("--suggest-seeds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    samples, rows, targets = features(arguments.data)
    found: dict[str, Any] = {"images": len(samples), "labels": targets.shape[1], "planted": {}, "suggest": {}}
    for planter in PLANTERS:
        figures = np.array([doubts(samples, rows, targets, planter, seed) for seed in range(arguments.seeds)])
        names = ("in_first_tenth", "auroc", "doubted", "doubted_that_are_wrong", "wrong_that_are_doubted")
        found["planted"][planter] = {
            name: round(float(value), 4) for name, value in zip(names, figures.mean(axis=0), strict=True)
        }
        print(planter, found["planted"][planter], flush=True)
    if arguments.suggest_seeds:
        gains = np.array([suggested(rows, targets, seed) for seed in range(arguments.suggest_seeds)])  # (seeds, ways, rounds + 1)
        difference = gains[:, 1] - gains[:, 0]
        half = 1.96 * difference.std(axis=0, ddof=1) / np.sqrt(len(gains))
        for number in range(1, ROUNDS + 1):
            mean = difference[:, number].mean()
            line = {way: round(float(gains[:, at, number].mean()), 4) for at, way in enumerate(WAYS)}
            over = [round(float(value), 4) for value in (mean, mean - half[number], mean + half[number])]
            found["suggest"][str(START + number * ADD)] = {**line, "over_random": over}
            print(START + number * ADD, found["suggest"][str(START + number * ADD)], flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


def features(data: Path) -> tuple[Sequence[Sample], Floats, Targets]:
    """Return the samples, their embeddings (N, D) by the default backbone, and their labels (N, C)."""
    spec, shared = parse_spec({"training_file": str(data)}), Shared.of(Workspace.from_environment())
    dataset, network = read_and_build(spec, shared)
    dataset = split_for(spec, dataset, None)
    views = Views(framing(spec, dataset, network.facts.preprocess))
    rows = pooled_features(network.prefix, dataset.samples, views, FeatureContext(shared.store))
    labels = [{dataset.label_text(sample), *seen_in_pixels(data / sample.id)} for sample in dataset.samples]
    names = sorted(set().union(*labels))
    return dataset.samples, np.asarray(rows), np.array([[name in of_image for name in names] for of_image in labels])


def planted(targets: Targets, planter: str, seed: int) -> tuple[Targets, NDArray[np.int64]]:
    """Return labels of which a share of the images has a wrong one, and these images."""
    rng = np.random.default_rng(seed)
    given, frequency = targets.copy(), targets.mean(axis=0)
    chosen = rng.choice(len(targets), round(SHARE * len(targets)), replace=False)
    for row in chosen:
        present, absent = np.flatnonzero(targets[row]), np.flatnonzero(~targets[row])
        change = {"any": rng.choice(["drop", "add", "replace"]), "replaced": "replace", "dropped": "drop"}[planter]
        if change != "add":
            given[row, rng.choice(present)] = False
        if change != "drop":
            share = frequency[absent] / frequency[absent].sum() if planter == "replaced" else None
            given[row, rng.choice(absent, p=share)] = True
    return given, chosen


def doubts(
    samples: Sequence[Sample], rows: Floats, targets: Targets, planter: str, seed: int
) -> tuple[float, float, float, float, float]:
    """Return what `finetune check` finds of planted labels; see `main` for the names of the figures."""
    given, chosen = planted(targets, planter, seed)
    wrong = np.zeros(len(given), bool)
    wrong[chosen] = True
    labelled = [replace(one, target=tuple(int(c) for c in np.flatnonzero(of))) for one, of in zip(samples, given, strict=True)]
    found = doubt_label_sets(labelled, rows, given.shape[1])
    assert found is not None
    in_order = wrong[np.argsort(found.confidence, kind="stable")]
    auroc = 1 - np.cumsum(~in_order)[in_order].mean() / (~in_order).sum()
    doubted = wrong[[one.row for one in found.doubted]]
    tenth = in_order[: len(in_order) // 10].sum() / wrong.sum()
    return float(tenth), float(auroc), float(len(doubted)), float(doubted.mean()), float(doubted.sum() / wrong.sum())


def suggested(rows: Floats, targets: Targets, seed: int) -> list[list[float]]:
    """Return for each of `WAYS` the mean average precision before and after each round of labelling."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows))
    test, pool = order[: len(order) // 4], order[len(order) // 4 :]
    found = []
    for way in WAYS:
        of_way, labelled, figures = np.random.default_rng([seed, 1]), pool[:START], []
        for number in range(ROUNDS + 1):
            head = solve_sigmoid_head(rows[labelled], targets[labelled].astype(np.int64), targets.shape[1])
            judged = label_results(head.logits(rows[test]), targets[test].astype(np.int64))
            figures.append(mean_average_precision(judged))
            if number == ROUNDS:
                break
            left = np.setdiff1d(pool, labelled)
            if way == "at random":
                more = of_way.choice(len(left), ADD, replace=False)
            else:
                assert head.held_out_logits is not None
                known = targets[labelled[head.held_out_images]].astype(np.int64)
                thresholds = task_named("multilabel").choose_thresholds(head.held_out_logits, known)
                uncertainty = label_uncertainty(sigmoid(head.logits(rows[left])), sigmoid(np.asarray(thresholds)))
                more = choose(uncertainty, rows[left], ADD, int(of_way.integers(2**31)))
            labelled = np.concatenate([labelled, left[more]])
        found.append(figures)
    return found


if __name__ == "__main__":
    main()
