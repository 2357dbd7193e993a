"""How often the 95 % interval of the mean over classes holds the truth, where classes are unequal and some are small.

Draws answers to test images of classes whose recall is known, and counts how often
`finetune.metrics.intervals.interval_of_mean_of_proportions` holds the mean of these recalls, beside Wald's interval, which takes
each class's variance from its share. ``python benchmarks/macro_interval.py`` prints the table and writes
``results/macro_interval.json``; a minute on one core.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from finetune.metrics.intervals import Z95, interval_of_mean_of_proportions

DRAWS = 2000
TEST_IMAGES = {
    "100, 5": [100, 5],
    "200, 3": [200, 3],
    "100, 20, 2": [100, 20, 2],
    "5 classes, 100 to 2": [100, 40, 16, 6, 2],
    "10 classes, 100 to 2": np.geomspace(100, 2, 10).round(),
    "9 of 50, one of 2": [50] * 9 + [2],
    "20 classes, 60 to 1": np.geomspace(60, 1, 20).round(),
    "5 of 40, 45 of 3": [40] * 5 + [3] * 45,
    "100 classes, 50 to 1": np.geomspace(50, 1, 100).round(),
}


def wald(right: Sequence[float], n: Sequence[int]) -> tuple[float, float]:
    shares = [k / m for k, m in zip(right, n, strict=True)]
    mean = sum(shares) / len(shares)
    half = Z95 * math.sqrt(sum(share * (1 - share) / m for share, m in zip(shares, n, strict=True))) / len(shares)
    return mean - half, mean + half


def recalls(n: np.ndarray, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Return recalls of the classes, by what they are like."""
    rank = np.arange(len(n)) / (len(n) - 1)
    return {
        "0.80 each": np.full(len(n), 0.8),
        "0.95 each": np.full(len(n), 0.95),
        "0.99 each": np.full(len(n), 0.99),
        "0.95 falling to 0.50": 0.95 - 0.45 * rank,
        "0.40 to 1 at random": generator.uniform(0.4, 1.0, len(n)),
    }


def main() -> None:
    generator = np.random.default_rng(7)
    rows = []
    for title, images in TEST_IMAGES.items():
        n = np.array(images, np.int64)
        for kind, truth in recalls(n, generator).items():
            drawn = generator.binomial(n, truth, (DRAWS, len(n)))
            row: dict[str, object] = {"test images": title, "recall": kind}
            for name, method in (("ours", interval_of_mean_of_proportions), ("wald", wald)):
                bounds = np.array([method(right.tolist(), n.tolist()) for right in drawn])
                inside = (bounds[:, 0] <= truth.mean() + 1e-12) & (truth.mean() <= bounds[:, 1] + 1e-12)
                row |= {f"{name}_coverage": inside.mean(), f"{name}_width": (bounds[:, 1] - bounds[:, 0]).mean()}
            rows.append(row)
            print(
                f"{title:22} {kind:22} ours {row['ours_coverage']:6.1%} (width {row['ours_width']:.3f})   "
                f"Wald {row['wald_coverage']:6.1%} (width {row['wald_width']:.3f})"
            )
    ours = np.array([row["ours_coverage"] for row in rows])
    print(f"ours: mean {ours.mean():.1%}, least {ours.min():.1%}; below 93 %: {int((ours < 0.93).sum())} of {len(ours)}")
    path = Path(__file__).parent / "results" / "macro_interval.json"
    path.write_text(json.dumps({"draws": DRAWS, "asked": 0.95, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
