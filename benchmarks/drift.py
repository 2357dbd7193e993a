"""How often the drift watch is wrong, and what it finds in 200 and 1,000 live photographs.

    python benchmarks/drift.py --data photos --others other_photos --rounds 200

The images go once through the default backbone as they are, once for each change of the camera (blurred, darkened), and so do
photographs of other things. Each round divides them anew, at random: 40 % train a linear probe, 10 % are val, 10 % the reference
(as test is in a run), and live windows are drawn from the other 40 %; everything after the embeddings is what a run, a bundle and
a server do. Prints JSON, and writes it with ``--out``.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

import finetune
from finetune.bundle.image import decode_image
from finetune.bundle.predictor import Predictor
from finetune.data.dataset import Sample
from finetune.data.index import index_dataset
from finetune.evaluation.calibrate import fit_calibration
from finetune.evaluation.drift import reference_of
from finetune.evaluation.predict import image_samples
from finetune.evaluation.predictions import Predictions, digests_as_rows
from finetune.features.softmax_head import solve_softmax_head
from finetune.features.solve import head_logits
from finetune.metrics.intervals import wilson_interval
from finetune.monitoring.drift import ALPHA, MIN_WINDOW, DriftTest, compare
from finetune.monitoring.reference import Reference
from finetune.monitoring.statistics import PredictionStatistics, concatenated, statistics_of
from finetune.monitoring.window import WINDOW_IMAGES, Window
from finetune.runs.evaluate import fit_temperature
from finetune.tasks import task_named

SIZES = (MIN_WINDOW, WINDOW_IMAGES)
STREAM_IMAGES, LOOK_EVERY = 10_000, 100  # as the server looks
ROUNDS_OF_ACCURACY = 20
MIXES = {"the commonest class a third as often": 1 / 3, "the commonest class not at all": 0.0}
PARTS = {"a tenth blurred": ("blurred, radius 3 %", 0.1), "a third blurred": ("blurred, radius 3 %", 1 / 3)}
OTHERS = {"a twentieth of other things": 0.05, "a fifth of other things": 0.2, "other things alone": 1.0}


def blurred(share: float) -> Callable[[Image.Image], Image.Image]:
    return lambda photo: photo.filter(ImageFilter.GaussianBlur(share * min(photo.size)))


def darkened(factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda photo: ImageEnhance.Brightness(photo).enhance(factor)


CHANGES: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "plain": lambda photo: photo,
    "blurred, radius 1 %": blurred(0.01),
    "blurred, radius 3 %": blurred(0.03),
    "darkened to 50 %": darkened(0.5),
    "darkened to 25 %": darkened(0.25),
}


@dataclass(frozen=True)
class Photographs:
    """Embeddings of the same images under every change, and of photographs of other things."""

    embeddings: Mapping[str, NDArray[np.float32]]  # change -> (N, D)
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    others: NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--others", type=Path, required=True, help="a folder of photographs of other things")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--features", type=Path, help="where embeddings are kept between calls (.npz)")
    parser.add_argument("--workspace", type=Path, default=Path(".finetune"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    photographs = embedded(arguments)
    found: dict[str, Any] = {
        "images": len(photographs.labels),
        "others": len(photographs.others),
        "rounds": arguments.rounds,
        "alpha": ALPHA,
    }
    found |= measured(photographs, arguments.rounds)
    found["accuracy"] = accuracy(photographs, min(arguments.rounds, ROUNDS_OF_ACCURACY))
    found["microseconds"] = cost(photographs)
    print(json.dumps(found, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


def embedded(arguments: argparse.Namespace) -> Photographs:
    if arguments.features and arguments.features.exists():
        with np.load(arguments.features) as kept:
            embeddings = {name: kept[name] for name in CHANGES}
            return Photographs(embeddings, kept["labels"], tuple(map(str, kept["classes"])), kept["others"])
    run = finetune.train(arguments.data, workspace=arguments.workspace, name="drift", trackers=())
    predictor = Predictor.load(run.bundle)
    dataset = index_dataset(arguments.data, for_training=False)
    embeddings = {name: asked(predictor, dataset.samples, change) for name, change in CHANGES.items()}
    labels = np.array([sample.target for sample in dataset.samples], np.int64)
    others = asked(predictor, image_samples([arguments.others]), CHANGES["plain"])
    if arguments.features:
        np.savez(arguments.features, **embeddings, labels=labels, classes=np.array(dataset.classes), others=others)  # type: ignore[arg-type]
    return Photographs(embeddings, labels, tuple(dataset.classes), others)


def asked(predictor: Predictor, samples: Sequence[Sample], change: Callable[[Image.Image], Image.Image]) -> NDArray[np.float32]:
    """Return the embeddings of images that a camera has changed, each saved again as a JPEG file."""
    found = []
    for sample in samples:
        stream = io.BytesIO()
        change(Image.fromarray(decode_image(sample.read()))).save(stream, "JPEG", quality=92)
        found.append(predictor.run(predictor.manifest.preprocess.load(stream.getvalue())[None]).embedding[0])
    return np.stack(found)


@dataclass(frozen=True)
class Watch:
    """One round: a model, its reference, and what it answers to live images."""

    reference: Reference
    of_val: Reference  # where there is no test
    answers: Callable[[NDArray[np.float32]], PredictionStatistics]
    live: NDArray[np.int64]  # rows


def watch(photographs: Photographs, seed: int) -> Watch:
    plain, labels = photographs.embeddings["plain"], photographs.labels
    order = np.random.default_rng(seed).permutation(len(labels))
    ends = [round(len(order) * share) for share in (0.4, 0.5, 0.6)]
    train, val, test, live = np.split(order, ends)
    n_classes = len(photographs.classes)
    head = solve_softmax_head(plain[train], labels[train], n_classes, val_features=plain[val], val_targets=labels[val])

    def table(split: str, rows: NDArray[np.int64]) -> Predictions:
        logits = head_logits(plain[rows], head.weight, head.bias)
        ids = tuple(map(str, rows))
        return Predictions(
            split, "multiclass", photographs.classes, ids, digests_as_rows([""] * len(rows)), labels[rows], logits, plain[rows]
        )

    of_val = table("val", val)
    scaled = fit_temperature(of_val)
    temperature = scaled.temperature if scaled else 1.0
    fitted = fit_calibration(of_val, temperature, embeddings_match=True)
    assert fitted is not None
    subspace = fitted.subspace

    def answers(embeddings: NDArray[np.float32]) -> PredictionStatistics:
        logits = head_logits(embeddings, head.weight, head.bias)
        probs = task_named("multiclass").probabilities(logits, temperature)
        return statistics_of("multiclass", probs, embeddings, subspace)

    reference = reference_of(table("test", test), temperature, subspace)
    second = reference_of(of_val, temperature, subspace, fitted_on_these=True)
    assert reference is not None
    assert second is not None
    return Watch(reference, second, answers, live)


def measured(photographs: Photographs, rounds: int) -> dict[str, Any]:
    """Return how many windows of each kind raised an alarm, and by which test."""
    alarms: dict[str, Counter[str]] = defaultdict(Counter)
    windows: Counter[str] = Counter()
    streams = Counter[str]()
    for seed in range(rounds):
        one = watch(photographs, seed)
        draw = np.random.default_rng(10_000 + seed)
        for size in SIZES:
            for name, live in drawn_windows(photographs, one, size, draw).items():
                kind = f"{name}, {size}"
                windows[kind] += 1
                count(alarms[kind], compare(one.reference, live))
            kind = f"the same, reference val, {size}"
            windows[kind] += 1
            rows = draw.choice(one.live, size, replace=False)
            count(alarms[kind], compare(one.of_val, one.answers(photographs.embeddings["plain"][rows])))
        for name, reference in (("reference test", one.reference), ("reference val", one.of_val)):
            looks, wrong = stream(reference, one.answers(photographs.embeddings["plain"][one.live]), draw)
            streams[f"{name}: streams"] += 1
            streams[f"{name}: streams with an alarm"] += wrong > 0
            streams[f"{name}: looks"] += looks
            streams[f"{name}: wrong looks"] += wrong
    return {
        "windows": {
            kind: {
                "windows": total,
                "alarms": alarms[kind]["any"],
                "share": alarms[kind]["any"] / total,
                "interval": wilson_interval(alarms[kind]["any"], total),
                "by": {test: n for test, n in sorted(alarms[kind].items()) if test != "any"},
            }
            for kind, total in windows.items()
        },
        "streams": {"images_each": STREAM_IMAGES, "look_every": LOOK_EVERY, **streams},
    }


def accuracy(photographs: Photographs, rounds: int) -> dict[str, float]:
    """Return the mean accuracy on live images under each change: how much it matters."""
    of: dict[str, list[float]] = defaultdict(list)
    for seed in range(rounds):
        one = watch(photographs, seed)
        for name, embeddings in photographs.embeddings.items():
            right = one.answers(embeddings[one.live]).label == photographs.labels[one.live]
            of[name].append(float(right.mean()))
    return {name: round(float(np.mean(values)), 4) for name, values in of.items()}


def drawn_windows(photographs: Photographs, one: Watch, size: int, draw: np.random.Generator) -> dict[str, PredictionStatistics]:
    """Return a live window of every kind."""
    plain, labels = photographs.embeddings["plain"], photographs.labels
    rows = draw.choice(one.live, size, replace=False)
    found = {"the same": one.answers(plain[rows])}
    commonest = np.bincount(labels).argmax()
    for name, share in MIXES.items():
        weights = np.where(labels[one.live] == commonest, share, 1.0)
        mixed = draw.choice(one.live, size, p=weights / weights.sum())  # with replacement: too few are left otherwise
        found[name] = one.answers(plain[mixed])
    for name in list(CHANGES)[1:]:
        found[name] = one.answers(photographs.embeddings[name][rows])
    for name, (change, share) in PARTS.items():
        n_changed = round(share * size)
        parts = [one.answers(photographs.embeddings[change][rows[:n_changed]]), one.answers(plain[rows[n_changed:]])]
        found[name] = concatenated(parts)
    for name, share in OTHERS.items():
        n_others = round(share * size)
        if n_others <= len(photographs.others):
            strange = draw.choice(len(photographs.others), n_others, replace=False)
            found[name] = concatenated([one.answers(photographs.others[strange]), one.answers(plain[rows[n_others:]])])
    return found


def count(alarms: Counter[str], tests: Sequence[DriftTest]) -> None:
    drifted = [test.name for test in tests if test.drifted]
    alarms.update(drifted)
    alarms["any"] += bool(drifted)


def stream(reference: Reference, live: PredictionStatistics, draw: np.random.Generator) -> tuple[int, int]:
    """Look at a stream of images of the same kind as the server does; return the looks, and those that raised an alarm."""
    window = Window("", 1 + int(live.label.max()), several=False)
    looks = wrong = 0
    for _ in range(STREAM_IMAGES // LOOK_EVERY):
        rows = draw.integers(0, len(live), LOOK_EVERY)
        window.add(PredictionStatistics(live.confidence[rows], live.label[rows], live.distance[rows]), 0.0)
        if len(window) >= MIN_WINDOW:
            looks += 1
            wrong += any(test.drifted for test in compare(reference, window.statistics()))
    return looks, wrong


def cost(photographs: Photographs) -> dict[str, float]:
    """Return what a request pays (the statistics of one answer), and what the thread beside it pays for a look."""
    one = watch(photographs, 0)
    plain, n_classes = photographs.embeddings["plain"], len(photographs.classes)
    single, probs = plain[:1], np.full((1, n_classes), 1 / n_classes)
    predictions = Predictions(
        "val", "multiclass", photographs.classes, ("",) * 500, digests_as_rows([""] * 500), photographs.labels[:500],
        np.zeros((500, n_classes), np.float32), plain[:500],
    )  # fmt: skip
    fitted = fit_calibration(predictions, 1.0, embeddings_match=True)
    assert fitted is not None
    window = one.answers(plain[one.live[:WINDOW_IMAGES]])
    return {
        "statistics of one answer": per_call(lambda: statistics_of("multiclass", probs, single, fitted.subspace)),
        "one look": per_call(lambda: compare(one.reference, window)),
    }


def per_call(work: Callable[[], object], calls: int = 500) -> float:
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return round(1e6 * float(np.median(times)), 1)


if __name__ == "__main__":
    main()
