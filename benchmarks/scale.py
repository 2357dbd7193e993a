"""Does a linear probe grow with its images as it should: time in proportion, memory by no more than the features themselves?

    python benchmarks/scale.py --images 15000 30000 60000

Makes small JPEGs (ten classes of coloured stripes with noise, 1,000 to a class folder and more), runs `finetune train` on them in
fresh processes and fresh workspaces, and watches each process tree from outside.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from peers.measure import run_measured
from PIL import Image

N_CLASSES = 10
SIDE_PX = 72


def make_images(folder: Path, first: int, last: int) -> None:
    """Image number i is the same in every dataset that holds it; a tenth of each class goes to val."""
    for label in range(N_CLASSES):
        for split in ("train", "val"):
            (folder / split / f"class_{label}").mkdir(parents=True, exist_ok=True)

    def make(number: int) -> None:
        generator = np.random.default_rng(number)
        label = number % N_CLASSES
        pixels = generator.integers(0, 160, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
        pixels[:, :: label + 2, label % 3] += 80
        split = "val" if number // N_CLASSES % 10 == 0 else "train"
        Image.fromarray(pixels).save(folder / split / f"class_{label}" / f"{number:06d}.jpg", quality=85)

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, range(first, last)))


def run(folder: Path, size_px: int, work: Path, n_images: int) -> dict[str, float]:
    home, log = work / f"home-{n_images}", work / f"run-{n_images}"
    command = [
        sys.executable, "-m", "finetune", "train", "--data", str(folder), "--method", "linear_probe", "--json",
        "--set", f"model.input_size_px={size_px}",
    ]  # fmt: skip
    cost = run_measured(command, {**os.environ, "FINETUNE_HOME": str(home)}, log, timeout_seconds=7200)
    metrics = json.loads(log.with_suffix(".out").read_text())["metrics"]
    return {
        "images": n_images,
        "seconds": cost.seconds,
        "cpu_seconds": cost.cpu_seconds,
        "others_cpu_seconds": cost.others_cpu_seconds,
        "peak_bytes": cost.peak_bytes,
        "val_top1": metrics["val/top1"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[15_000, 30_000, 60_000])
    parser.add_argument("--input-size-px", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale.json"))
    given = parser.parse_args()
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="finetune-scale-") as work:
        folder, made = Path(work, "images"), 0
        for n_images in sorted(given.images):
            make_images(folder, made, n_images)
            made = n_images
            rows.append(run(folder, given.input_size_px, Path(work), n_images))
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps({"input_size_px": given.input_size_px, "rows": rows}, indent=2) + "\n")
    print("| images | seconds | CPU s | CPU ms an image | peak MB | CPU s of others |\n|---|---|---|---|---|---|")
    for row in rows:
        each_ms = 1000 * row["cpu_seconds"] / row["images"]
        print(
            f"| {row['images']:,} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} | {each_ms:.2f} "
            f"| {row['peak_bytes'] / 1e6:,.0f} | {row['others_cpu_seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
