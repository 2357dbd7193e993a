"""What no way of using a frozen network can go below: every image decoded once, and one forward pass for each.

    python floor.py photos/train photos/validation --threads 2 --out steps.json

Both are done on all cores, one after the other, by the fastest arrangement that we know: ONNX Runtime with one core a batch of
eight. Images are held a few hundred at a time. The export of the graph is not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from finetune.data.index import index_dataset
from finetune.features.engine import OnnxEngine
from finetune.features.prefix import PixelPrefix, export_prefix
from finetune.model.backbone import build_backbone
from finetune.model.classifier import Classifier
from finetune.runtime.session import open_session

BACKBONE = "tf_efficientnet_lite0"
HELD_IMAGES = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("val", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()

    samples = index_dataset(given.train, given.val).samples
    classifier = Classifier(build_backbone(BACKBONE), 10)
    preprocess = classifier.backbone.preprocess
    engine = OnnxEngine(open_session(export_prefix(PixelPrefix(classifier, len(classifier.backbone.stages)))))
    engine.run(np.zeros((engine.batch_size, *preprocess.input_size_px, 3), np.uint8))  # the first call reserves memory

    steps = {"decoding": 0.0, "forward pass": 0.0}
    cpu_before = time.process_time()
    with ThreadPoolExecutor(given.threads) as pool:
        for start in range(0, len(samples), HELD_IMAGES):
            began = time.perf_counter()
            images = np.stack(list(pool.map(lambda sample: sample.decode(preprocess.load), samples[start : start + HELD_IMAGES])))
            decoded = time.perf_counter()
            list(pool.map(engine.run, np.split(images, range(engine.batch_size, len(images), engine.batch_size))))
            steps["decoding"] += decoded - began
            steps["forward pass"] += time.perf_counter() - decoded
    given.out.write_text(
        json.dumps({**steps, "floor": sum(steps.values()), "floor, CPU": time.process_time() - cpu_before}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
