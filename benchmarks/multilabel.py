"""A multi-label run end to end on real photographs: kind, lightness and colour of clothes, and equal answers through every door.

    python benchmarks/multilabel.py --data clothes --methods linear_probe partial --out results/multilabel.json

The labels of a photograph are its class folder, what is measured in the pixels of its middle (dark or light, and its hue where it
has one), and nothing else, so that nobody had to label anything. ``validation`` becomes the test split. Each method is trained on
the table that this writes; then the probabilities of the bundle are compared with those of torch, of the server over HTTP and of
the MLflow model on the same files. Prints JSON, and writes it with ``--out``.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import finetune
from finetune.bundle.mlflow_model import BundleModel
from finetune.bundle.predictor import Predictor

HUES = {"red": (345, 20), "yellow": (20, 70), "green": (70, 165), "blue": (165, 260), "purple": (260, 345)}  # degrees
DARK, LIGHT = 0.35, 0.75  # median brightness of the middle
COLOURED, SATURATED, BRIGHT = 0.4, 0.35, 0.2  # share of pixels that have a hue; what such a pixel has at least
COMPARED = 40  # images whose probabilities are compared over all doors


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="class folders in train/ and validation/")
    parser.add_argument("--methods", nargs="+", default=["linear_probe"])
    parser.add_argument("--settings", nargs="*", default=[], help="for every method: hyperparameters.n_epochs=2")
    parser.add_argument("--images", type=int, help="of each class and split, at most")
    parser.add_argument(
        "--folder", type=Path, help="where the table, its images and the workspace are put; default: a temporary one"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    table, counts = labelled(arguments.data, folder / "clothes", arguments.images)
    settings: dict[str, Any] = dict(setting.split("=", 1) for setting in arguments.settings)
    settings = {key: json.loads(value) for key, value in settings.items()}
    found: dict[str, Any] = {"images": sum(counts["images"].values()), "labels": dict(counts["labels"]), "runs": {}}
    for method in arguments.methods:
        run = finetune.train(
            table,
            method=method,
            name=f"clothes-{method.replace('_', '-')}",
            settings={"data.label_separator": "|", **settings},
            workspace=folder / "workspace",
            trackers=(),
        )
        found["runs"][method] = {
            **{key: round(value, 4) for key, value in run.metrics.items() if key.startswith("test/")},
            "train_seconds": round(run.cost["train_seconds"], 1),
            "largest_difference": differences(run.bundle, sorted((table.parent / "test").glob("*/*")), folder / "server"),
        }
    print(json.dumps(found, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


def labelled(source: Path, target: Path, most: int | None = None) -> tuple[Path, dict[str, Counter[str]]]:
    """Copy the photographs beside a table of their labels; return the table and the counts of images and labels."""
    rows: list[tuple[str, str, str]] = []
    counts: dict[str, Counter[str]] = {"images": Counter(), "labels": Counter()}
    for given, split in (("train", "train"), ("validation", "test")):
        for kind in sorted(path for path in (source / given).iterdir() if path.is_dir()):
            for file in sorted(kind.iterdir())[:most]:
                place = target / split / kind.name / file.name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
                labels = [kind.name, *seen_in_pixels(file)]
                rows.append((str(place.relative_to(target)), "|".join(labels), split))
                counts["images"][split] += 1
                counts["labels"].update(labels)
    table = target / "labels.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("file", "label", "split"), *rows])
    return table, counts


def seen_in_pixels(file: Path) -> list[str]:
    """Return dark or light, and the hue, of the middle of a photograph, as far as it is any of these."""
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    width, height = picture.size
    middle = picture.crop((width // 4, height // 4, 3 * width // 4, 3 * height // 4)).resize((32, 32), Image.Resampling.BOX)
    hue, saturation, brightness = np.moveaxis(np.asarray(middle.convert("HSV"), np.float64).reshape(-1, 3) / 255, 1, 0)
    median = float(np.median(brightness))
    labels = ["dark"] if median < DARK else ["light"] if median > LIGHT else []
    coloured = (saturation > SATURATED) & (brightness > BRIGHT)
    if coloured.mean() > COLOURED:
        degrees = hue[coloured] * 360
        shares = {name: float((((degrees - low) % 360) < ((high - low) % 360)).mean()) for name, (low, high) in HUES.items()}
        labels.append(max(shares, key=lambda name: shares[name]))
    return labels


def differences(bundle: Path, files: Sequence[Path], home: Path) -> dict[str, float]:
    """Return the largest difference of any probability between the bundle and each other door, on the same files."""
    from starlette.testclient import TestClient

    from service.asgi import create_app
    from service.settings import ServerSettings

    files = files[:: max(1, len(files) // COMPARED)]
    predictor = Predictor.load(bundle)
    classes = predictor.manifest.classes
    ours = np.array([list(predictor.predict(file.read_bytes()).several.scores.values()) for file in files])  # type: ignore[union-attr]
    answers = BundleModel(predictor).predict([str(file) for file in files], {"top_k": len(classes)})
    of_mlflow = [{one["label"]: one["probability"] for one in row} for row in answers["predictions"]]
    parity = predictor.manifest.parity
    found = {"torch": max(parity["max_prob_difference"], parity["max_prob_difference_from_bytes"])}
    found["mlflow"] = float(np.abs(ours - np.array([[row[name] for name in classes] for row in of_mlflow])).max())
    with TestClient(create_app(ServerSettings(home, model=str(bundle))), base_url="http://127.0.0.1") as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.1)
        over_http = [client.post("/predict", files={"image": file.read_bytes()}).json()["scores"] for file in files]
    found["http"] = float(np.abs(ours - np.array([[row[name] for name in classes] for row in over_http])).max())
    return {**found, "images": len(files)}


if __name__ == "__main__":
    main()
