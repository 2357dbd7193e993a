"""Damaged files of every format: an array or an `ImageError`, never anything else."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from awkward import AWKWARD

from finetune.bundle.image import decode_image
from finetune.bundle.image_limits import ImageLimits
from finetune.errors import ImageError

SEEDS = {name: data for name, (data, _) in AWKWARD.items() if 0 < len(data) < 60_000}
LIMITS = ImageLimits(max_pixels=2_000_000)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, deleted, inserted or cut off, half of them in the header."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 2, 4, 16])):
        at = rng.randrange(min(len(damaged), 200) if rng.random() < 0.5 else len(damaged))
        match rng.randrange(10):
            case 0:
                del damaged[at : at + rng.choice([1, 2, 50])]
            case 1:
                damaged[at:at] = rng.randbytes(rng.choice([1, 4, 40]))
            case 2:
                del damaged[max(8, at) :]
            case 3:
                damaged[at] = 255
            case _:
                damaged[at] = rng.randrange(256)
        if not damaged:
            break
    return bytes(damaged)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_mutated_file_is_decoded_or_refused() -> None:
    rng = random.Random(20)
    names = sorted(SEEDS)
    outcomes: Counter[str] = Counter()
    for round_number in range(6_000):
        data = mutated(SEEDS[names[round_number % len(names)]], rng)
        try:
            rgb = decode_image(data, short_side_px=rng.choice([None, 16]), limits=LIMITS)
        except ImageError as error:
            outcomes[type(error).__name__] += 1
        else:
            assert rgb.dtype == np.uint8
            assert rgb.shape[2:] == (3,)
            outcomes["decoded"] += 1
    assert len(names) >= 60
    assert min(outcomes[kind] for kind in ("decoded", "ImageError", "ImageTooLarge", "UnsupportedImage")) >= 50, outcomes
