"""Images per second that training sustains on a GPU, beside what its step alone could do. Runs in the folder of check.py.

    python sustained.py --out sustained.json --images 8000 --epochs 3

The photographs of the folder are cropped and mirrored into as many different files as asked. Then, for each backbone, the step
alone is timed (forward, backward; images already on the device) in float32 and bfloat16 by batch size; then the product trains,
in full and as a probe, and each epoch's images per second are read from its journal. A step that is far faster than an epoch
means that decoding and augmentation on the processor's cores set the pace.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BACKBONES = {"tf_efficientnet_lite0": "auto", "resnet50": "none"}
BATCHES = (16, 32, 64, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sustained.json"))
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--site", type=Path, help="wheels unpacked before, as check.py --keep leaves them")
    parser.add_argument("--steps-alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps_alone:
        return steps_alone(options.steps_alone, options.device, options.batches)

    import check  # lies beside this file in the folder that build.py makes

    folder = Path(tempfile.mkdtemp(prefix="sustained-"))
    if options.site:
        (folder / "site").symlink_to(options.site.resolve(), target_is_directory=True)
    try:
        checking = check.Check(folder, options.out, time.monotonic() + 3600)
        photographs(folder / "photos", options.images)
        found: dict[str, Any] = {"machine": checking._look_at_machine(), "images": options.images, "steps": {}, "runs": {}}
        augmentation = found["machine"]["augmentation"]
        for backbone in options.backbones:
            found["steps"][backbone] = child(checking.environment, "--steps-alone", backbone, "--device", options.device,
                                             "--batches", *map(str, options.batches))  # fmt: skip
            for method in ("linear_probe", "full"):
                request: dict[str, Any] = {
                    "training_file": str(folder / "photos"),
                    "model": {"backbone": backbone, "weights": BACKBONES.get(backbone, "auto")},
                    "method": {"type": method},
                    "augmentation": augmentation,
                    "compute": {"device": options.device},
                    "suffix": f"{method}-{backbone}".replace("_", "-"),
                }
                if method == "full":
                    request["hyperparameters"] = {"n_epochs": options.epochs}
                found["runs"][f"{method} {backbone}"] = trained(checking.environment, folder, request)
                options.out.write_text(json.dumps(found, indent=2) + "\n")
        show(found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def photographs(target: Path, n_images: int) -> None:
    """Write `n_images` different photographs in class folders: crops of the folder's own, every other one mirrored."""
    sources = sorted((HERE / "data" / "train").glob("*/*"))
    with ProcessPoolExecutor() as pool:
        list(pool.map(_vary, [(str(sources[i % len(sources)]), str(target), i) for i in range(n_images)], chunksize=100))


def _vary(given: tuple[str, str, int]) -> None:
    from PIL import Image, ImageOps

    source, target, number = given
    drawn = random.Random(number)
    with Image.open(source) as image:
        width, height = image.size
        left, top = drawn.randrange(width // 8), drawn.randrange(height // 8)
        image = image.crop((left, top, left + width * 7 // 8, top + height * 7 // 8))
        image = (ImageOps.mirror(image) if number % 2 else image).resize((640, 640 * height // width))
    path = Path(target, Path(source).parent.name, f"{number:06d}.jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=88)


def child(environment: dict[str, str], *arguments: str) -> Any:
    ended = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        return {"failed": ended.stderr[-1500:]}
    return json.loads(ended.stdout.splitlines()[-1])


def trained(environment: dict[str, str], folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Train in a process of its own and read the rates of its epochs."""
    name = request["suffix"]
    spec, run = folder / f"{name}.yaml", folder / name
    spec.write_text(json.dumps(request))
    command = [sys.executable, "-m", "finetune", "train", str(spec), "--run-dir", str(run), "--json"]
    began = time.perf_counter()
    ended = subprocess.run(
        command, env={**environment, "FINETUNE_HOME": str(folder / "home")}, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        return {"failed": (ended.stdout + ended.stderr)[-1500:]}
    outcome = json.loads(ended.stdout)
    journal = [json.loads(line)["values"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return {
        "seconds": time.perf_counter() - began,
        "cost": outcome["cost"],
        "settings": next((event["settings"] for event in events if "settings" in event), {}),
        "images_per_second": [values["train/images_per_second"] for values in journal if "train/images_per_second" in values],
        "events": events,
    }


def steps_alone(backbone: str, device: str, batches: list[int]) -> None:
    """Print, as JSON, images per second of a forward and backward pass for each number format and batch size."""
    import torch

    from finetune.model.backbone import build_backbone
    from finetune.model.classifier import Classifier
    from finetune.training.machine import Numerics, autocast, computing_with, place, prepare_images

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    classifier = Classifier(build_backbone(backbone, weights="none"), 10).train()
    height, width = classifier.backbone.preprocess.input_size_px
    rates: dict[str, float] = {}
    for precision in ("float32", "bfloat16"):
        numerics = Numerics(device, precision, True, os.cpu_count() or 1)  # type: ignore[arg-type]
        with computing_with(numerics):
            place(classifier, numerics)
            for batch in batches:
                images = torch.full((batch, height, width, 3), 127, dtype=torch.uint8, device=device)
                taken = []
                for _ in range(12):
                    finish()
                    began = time.perf_counter()
                    with autocast(numerics):
                        logits = classifier(prepare_images(classifier, images, numerics))
                    logits.float().square().mean().backward()
                    classifier.zero_grad()
                    finish()
                    taken.append(time.perf_counter() - began)
                rates[f"{precision} {batch}"] = batch / statistics.median(taken[4:])
    print(json.dumps(rates))


def show(found: dict[str, Any]) -> None:
    for backbone, rates in found["steps"].items():
        print(backbone, {name: round(rate) if isinstance(rate, float) else rate for name, rate in rates.items()})
    for name, run in found["runs"].items():
        if "failed" in run:
            print(name, "failed:", run["failed"])
        else:
            rates = [round(rate) for rate in run["images_per_second"]]
            print(f"{name}: {run['seconds']:.1f} s, images/s by epoch {rates}, {run['settings']}, {run['cost']}")


if __name__ == "__main__":
    main()
