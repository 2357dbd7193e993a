"""Decode images as small grey pictures, to measure brightness and sharpness and to compare images. Torch-free."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.bundle.image import decode_image
from finetune.data.dataset import Sample


def grey(sample: Sample, side_px: int) -> NDArray[np.uint8]:
    """Return an image as grey values (h, w), scaled so that its longer side is `side_px`.

    Raises:
        ImageError: the image cannot be read.
    """
    rgb = sample.decode(partial(decode_image, short_side_px=side_px))
    picture = Image.fromarray(rgb).convert("L")
    scale = side_px / max(picture.size)
    size = (max(8, round(picture.width * scale)), max(8, round(picture.height * scale)))
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))
