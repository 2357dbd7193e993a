"""Whether sets of labels, abstention and novelty keep what they promise, on photographs divided again and again.

    python benchmarks/reliance.py --data photos --others other_photos --splits 200

The images go once through the default backbone. Each division is 70 % train, 15 % val and 15 % test of each class; the head is
solved as `finetune train` solves it, and everything after that is what a run and a served bundle do: temperature and calibration
on val, then each test image judged. Photographs of other things are those in ``--others``, and in further rounds the classes in
``--left-out``, of which the model is not told. Prints JSON, and writes it with ``--out``.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import finetune
from finetune.bundle.calibration import NOVEL, CertaintyEstimator, CertaintyOptions
from finetune.bundle.predictor import Predictor
from finetune.data.dataset import Sample
from finetune.data.index import index_dataset
from finetune.evaluation.calibrate import fit_calibration, reliability_after
from finetune.evaluation.predict import SamplePrediction, image_samples, predict_samples
from finetune.evaluation.predictions import Predictions, digests_as_rows
from finetune.features.softmax_head import solve_softmax_head
from finetune.features.solve import head_logits
from finetune.metrics.intervals import wilson_interval
from finetune.runs.evaluate import fit_temperature
from finetune.tasks import task_named

COVERAGE, PRECISION = 0.90, 0.95
VAL_FRACTION = TEST_FRACTION = 0.15
COMPARED_SPLITS = 10  # for the scores that novelty was chosen among: Mahalanobis distances take long
Embeddings = NDArray[np.float32]
Labels = NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--others", type=Path, help="a folder of photographs of other things")
    parser.add_argument("--left-out", nargs="*", default=[], help="rounds of classes that are other things: hat shoes,hat")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--features", type=Path, help="where embeddings are kept between calls (.npz)")
    parser.add_argument("--workspace", type=Path, default=Path(".finetune"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    features, labels, classes, others = embeddings_of(arguments)
    found: dict[str, Any] = {"images": len(labels), "classes": len(classes), "splits": arguments.splits}
    found |= promises(features, labels, classes, others, arguments.splits)
    if others is not None:
        found["scores"] = {"others": scores(features, labels, others)}
    for names in arguments.left_out:
        hidden = np.isin(labels, [classes.index(name) for name in names.split(",")])
        kept = np.unique(labels[~hidden], return_inverse=True)[1].astype(np.int64)
        found.setdefault("scores", {})[names] = scores(features[~hidden], kept, features[hidden])
    print(json.dumps(found, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


def embeddings_of(arguments: argparse.Namespace) -> tuple[Embeddings, Labels, list[str], Embeddings | None]:
    """Return the embeddings of all images with their labels, the classes, and the embeddings of other photographs."""
    if arguments.features and arguments.features.exists():
        with np.load(arguments.features) as kept:
            others = kept["others"] if len(kept["others"]) else None
            return kept["features"], kept["labels"], [str(name) for name in kept["classes"]], others
    run = finetune.train(arguments.data, workspace=arguments.workspace, name="reliance", trackers=())
    predictor = Predictor.load(run.bundle)
    dataset = index_dataset(arguments.data, for_training=False)
    features, labels = asked(predictor, dataset.samples)
    others = asked(predictor, image_samples([arguments.others]))[0] if arguments.others else None
    if arguments.features:
        empty = np.empty((0, features.shape[1]), np.float32)
        np.savez(
            arguments.features,
            features=features,
            labels=labels,
            classes=np.array(dataset.classes),
            others=empty if others is None else others,
        )
    return features, labels, list(dataset.classes), others


def asked(predictor: Predictor, samples: Sequence[Sample]) -> tuple[Embeddings, Labels]:
    answers = [answer for answer in predict_samples(predictor, samples) if isinstance(answer, SamplePrediction)]
    targets = [answer.sample.target if isinstance(answer.sample.target, int) else -1 for answer in answers]
    return np.stack([answer.embedding for answer in answers]), np.array(targets, np.int64)


def divided(labels: Labels, seed: int) -> tuple[Labels, Labels, Labels]:
    """Return the rows of train, val and test."""
    rng = np.random.default_rng(seed)
    parts: tuple[list[Labels], ...] = ([], [], [])
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        n_val, n_test = round(len(rows) * VAL_FRACTION), round(len(rows) * TEST_FRACTION)
        for part, chosen in zip(parts, (rows[n_val + n_test :], rows[:n_val], rows[n_val : n_val + n_test]), strict=True):
            part.append(chosen)
    train, val, test = (np.concatenate(part) for part in parts)
    return train, val, test


def promises(
    features: Embeddings, labels: Labels, classes: Sequence[str], others: Embeddings | None, splits: int
) -> dict[str, Any]:
    """Return what was promised beside what came of it, over divisions of the images."""
    of: dict[str, list[float]] = defaultdict(list)
    per_class = np.zeros((2, len(classes)))  # covered, images
    reached = two_sided = below = 0
    for seed in range(splits):
        train, val, test = divided(labels, seed)
        head = solve_softmax_head(
            features[train], labels[train], len(classes), val_features=features[val], val_targets=labels[val]
        )
        held_out, judged = (
            table(split, classes, features[rows], labels[rows], head_logits(features[rows], head.weight, head.bias))
            for split, rows in (("val", val), ("test", test))
        )
        found = fit_temperature(held_out)
        temperature = found.temperature if found else 1.0
        fitted = fit_calibration(held_out, temperature, embeddings_match=True)
        assert fitted is not None
        estimator = CertaintyEstimator(tuple(classes), fitted.calibration, fitted.subspace)
        probs = task_named("multiclass").probabilities(judged.logits, temperature)
        truth = [classes[label] for label in labels[test]]
        sets = [
            estimator.estimate(p, e, CertaintyOptions(COVERAGE)).labels or () for p, e in zip(probs, features[test], strict=True)
        ]
        of["accuracy"].append(float((probs.argmax(axis=1) == labels[test]).mean()))
        of["coverage"].append(float(np.mean([label in labels_of for label, labels_of in zip(truth, sets, strict=True)])))
        of["set_size"].append(float(np.mean([len(one) for one in sets])))
        by_class = CertaintyOptions(COVERAGE, per_class=True)
        sets = [estimator.estimate(p, e, by_class).labels or () for p, e in zip(probs, features[test], strict=True)]
        of["class_set_size"].append(float(np.mean([len(one) for one in sets])))
        for label, name, labels_of in zip(labels[test], truth, sets, strict=True):
            per_class[:, label] += name in labels_of, 1
        of["ece_before"].append(reliability_after(judged, 1.0, fitted_on_these=False).values["ece"])
        of["ece_after"].append(reliability_after(judged, temperature, fitted_on_these=False).values["ece"])
        assert fitted.subspace is not None
        limit = fitted.calibration.novelty[round(100 * NOVEL) - 1]
        of["false_rejects"].append(float((fitted.subspace.distances(features[test]) > limit).mean()))
        if others is not None:
            of["others_rejected"].append(float((fitted.subspace.distances(others) > limit).mean()))
        if f"{PRECISION:.2f}" not in fitted.calibration.precision:
            continue
        asked_for = estimator.resolved(CertaintyOptions(precision=PRECISION))
        said = [estimator.estimate(p, e, asked_for).abstained for p, e in zip(probs, features[test], strict=True)]
        answered = ~np.array(said, bool)
        right = int((probs.argmax(axis=1) == labels[test])[answered].sum())
        low, high = wilson_interval(right, int(answered.sum()))
        reached += high >= PRECISION
        two_sided += low <= PRECISION <= high
        below += right / answered.sum() < PRECISION
        of["precision"].append(right / int(answered.sum()))
        of["answered"].append(float(answered.mean()))
    n = len(of["precision"])
    return {
        "mean": {name: round(float(np.mean(values)), 4) for name, values in of.items()},
        "sd": {name: round(float(np.std(values)), 4) for name, values in of.items()},
        "class_coverage": {
            name: round(float(covered / images), 4) for name, covered, images in zip(classes, *per_class, strict=True)
        },
        "precision_splits": n,
        "interval_reaches_precision": round(reached / n, 4),
        "interval_holds_precision_on_both_sides": round(two_sided / n, 4),
        "test_precision_below_asked": round(below / n, 4),
    }


def table(split: str, classes: Sequence[str], features: Embeddings, labels: Labels, logits: NDArray[np.float32]) -> Predictions:
    ids = tuple(f"{split}/{row}" for row in range(len(labels)))
    return Predictions(split, "multiclass", tuple(classes), ids, digests_as_rows([""] * len(ids)), labels, logits, features)


# --- the scores that novelty was chosen among ------------------------------------------------------

Score = Callable[[Embeddings], NDArray[np.floating[Any]]]


def scores(features: Embeddings, labels: Labels, others: Embeddings) -> dict[str, dict[str, float]]:
    """Return for each score: AUROC of test against `others`, share of them rejected, and of test, at the 95 % point of val."""
    of: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    n_classes = int(labels.max()) + 1
    for seed in range(COMPARED_SPLITS):
        train, val, test = divided(labels, seed)
        head = solve_softmax_head(features[train], labels[train], n_classes, val_features=features[val], val_targets=labels[val])
        logits = head_logits(features[val], head.weight, head.bias)
        names = [str(label) for label in range(n_classes)]
        fitted = fit_calibration(table("val", names, features[val], labels[val], logits), 1.0, embeddings_match=True)
        assert fitted is not None
        assert fitted.subspace is not None
        limit = fitted.calibration.novelty[round(100 * NOVEL) - 1]
        of["ours"].append(judged(fitted.subspace.distances, limit, features[test], others))
        for name, score in other_scores(features[train], labels[train], head.weight, head.bias).items():
            of[name].append(judged(score, float(np.quantile(score(features[val]), NOVEL)), features[test], others))
    names_of = ("auroc", "others_rejected", "false_rejects")
    return {
        name: dict(zip(names_of, (round(float(value), 4) for value in np.mean(rows, axis=0)), strict=True))
        for name, rows in of.items()
    }


def judged(score: Score, limit: float, known: Embeddings, others: Embeddings) -> tuple[float, float, float]:
    inside, outside = score(known), score(others)
    ranks = np.argsort(np.argsort(np.concatenate([inside, outside])))
    auroc = (ranks[len(inside) :].sum() - len(outside) * (len(outside) - 1) / 2) / (len(inside) * len(outside))
    return float(auroc), float((outside > limit).mean()), float((inside > limit).mean())


def other_scores(train: Embeddings, labels: Labels, weight: Embeddings, bias: Embeddings) -> dict[str, Score]:
    def unit(values: Embeddings) -> NDArray[np.floating[Any]]:
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    def log_sum(values: Embeddings) -> NDArray[np.floating[Any]]:
        logits = head_logits(values, weight, bias)
        return np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)) + logits.max(axis=1)

    known = unit(train)
    means = np.stack([known[labels == label].mean(axis=0) for label in np.unique(labels)])
    within = known - means[np.searchsorted(np.unique(labels), labels)]
    spread, vectors = np.linalg.eigh(within.T @ within / len(within))
    whitening = vectors / np.sqrt(0.95 * np.maximum(spread, 0) + 0.05 * spread.mean())

    def mahalanobis(values: Embeddings) -> NDArray[np.floating[Any]]:
        differences = (unit(values) @ whitening)[:, None] - (means @ whitening)[None]
        return np.asarray(np.square(differences).sum(axis=2).min(axis=1))

    return {
        "least probability": lambda values: log_sum(values) - head_logits(values, weight, bias).max(axis=1),
        "energy": lambda values: -log_sum(values),
        "nearest neighbour": lambda values: -(unit(values) @ known.T).max(axis=1),
        "Mahalanobis": mahalanobis,
    }


if __name__ == "__main__":
    main()
