"""Images per second of one training step, by number format, memory layout and what happens to freed memory; side by side.

    python benchmarks/training_step.py --backbone tf_efficientnet_lite0 --out training_step.json

Every setting takes its step in turn, round after round, so that whatever else the machine does hits all of them alike.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import torch

from finetune.model.backbone import build_backbone
from finetune.model.classifier import Classifier
from finetune.runtime.allocator import retaining_memory
from finetune.runtime.cores import available_cores
from finetune.training.machine import Numerics, autocast, computes_bfloat16, computing_with, place, prepare_images


def step_seconds(classifier: Classifier, images: torch.Tensor, numerics: Numerics) -> tuple[float, int]:
    """Wall seconds and page faults of one forward and backward pass."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    began = time.perf_counter()
    with autocast(numerics):
        logits = classifier(prepare_images(classifier, images, numerics))
    logits.float().square().mean().backward()
    classifier.zero_grad()
    return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4, help="the first does not count")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--out", type=Path, default=Path("training_step.json"))
    given = parser.parse_args()

    classifier = Classifier(build_backbone(given.backbone, weights="none"), 10).train()
    height, width = classifier.backbone.preprocess.input_size_px
    images = torch.full((given.batch, height, width, 3), 127, dtype=torch.uint8)
    formats = ("float32", "bfloat16") if computes_bfloat16("cpu") else ("float32",)
    candidates = [Numerics("cpu", precision, layout, given.threads) for precision, layout in product(formats, (False, True))]
    taken: dict[tuple[bool, Numerics], list[tuple[float, int]]] = {}
    for _ in range(given.rounds):
        for retained, chosen in product((False, True), candidates):
            with retaining_memory() if retained else nullcontext(), computing_with(chosen):
                step_seconds(place(classifier, chosen), images, chosen)  # a run pays for its first step once
                taken.setdefault((retained, chosen), []).append(step_seconds(classifier, images, chosen))

    rows = [
        {
            **chosen.to_dict(),
            "memory_retained": retained,
            "images_per_second": given.batch / statistics.median(seconds for seconds, _ in steps[1:]),
            "page_faults": statistics.median(faults for _, faults in steps[1:]),
        }
        for (retained, chosen), steps in taken.items()
    ]
    given.out.write_text(json.dumps({"backbone": given.backbone, "batch": given.batch, "rows": rows}, indent=2) + "\n")
    print(f"{given.backbone}, batch {given.batch}, {given.threads} threads, median of {given.rounds - 1}")
    for row in rows:
        layout = "channels last" if row["channels_last"] else "channels first"
        memory = "retained" if row["memory_retained"] else "returned"
        figures = f"{row['images_per_second']:6.1f} images/s  {row['page_faults']:9,.0f} page faults"
        print(f"  {row['precision']:<9} {layout:<14} memory {memory}  {figures}")


if __name__ == "__main__":
    main()
