"""Pictures with several labels, small enough for unit tests: each of three colours is in them or not, whatever the others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ("blue", "green", "red")


def write_colours(folder: Path, count: int, seed: int = 0, *, wrong: float = 0.0) -> Path:
    """Write `count` pictures beside a table of their labels, none included; return the table.

    Args:
        wrong: the share of labels that are given where the colour is not, and the other way round.
    """
    chance = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        labels = [name for name, there in zip(COLOURS, chance.random(3) < 0.45, strict=True) if there]
        pixels = chance.integers(0, 60, (64, 64, 3))
        for name in labels:
            pixels[..., 2 - COLOURS.index(name)] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.png")
        flipped = [name for name in COLOURS if (name in labels) != (chance.random() < wrong)]
        rows.append(json.dumps({"file": f"{number:03d}.png", "label": flipped}))
    table = folder / "labels.jsonl"
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return table
