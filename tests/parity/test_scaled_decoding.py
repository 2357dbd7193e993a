"""Decoding a big JPEG at a reduced scale shows the model the same picture as decoding all of it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from awkward import encoded, textured
from PIL import Image

from finetune.bundle.image import decode_image, image_size
from finetune.bundle.preprocess import Preprocess


def preprocess(input_px: int, resize: str = "crop") -> Preprocess:
    return Preprocess((input_px, input_px), resize, 0.875, "bicubic", (124, 116, 104), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # type: ignore[arg-type]


def differences(data: bytes, shown: Preprocess) -> np.ndarray:
    """(h, w, 3) absolute grey levels between the input made from a reduced decode and from a full one."""
    width, height = image_size(data)
    assert decode_image(data, short_side_px=shown.decode_short_side_px).shape[:2] < (height, width), (
        "was not decoded at a reduced scale"
    )
    return np.abs(shown.load(data).astype(np.int16) - shown(decode_image(data)))


def test_real_photographs_differ_by_under_half_a_grey_level(photos: Path) -> None:
    """At 64 px these 400-px photos are decoded at a half: sharp to the pixel, a harder case than a phone's 12 MP at 224 px."""
    paths = sorted((photos / "validation").rglob("*.jpg"))[::6]
    assert len(paths) >= 50
    means = [differences(path.read_bytes(), preprocess(64)).mean() for path in paths]
    assert np.mean(means) < 0.5
    assert max(means) < 2.5


def stripes(width: int, height: int, orientation: int) -> bytes:
    """A JPEG of diagonal stripes, where a shift by a fraction of a pixel shows, tagged with an EXIF orientation."""
    y, x = np.mgrid[0:height, 0:width]
    grey = (128 + 100 * np.sin((3 * x + 2 * y) / 25)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "JPEG", quality=95, exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize("resize", ["crop", "squash", "letterbox"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sides_that_the_scale_does_not_divide_move_nothing_however_the_camera_was_held(orientation: int, resize: str) -> None:
    """457 and 633 at a quarter leave a quarter of a pixel over; taken for picture, it moves these stripes by 15 grey levels."""
    assert differences(stripes(633, 457, orientation), preprocess(48, resize)).mean() < 1.5


def test_a_12_megapixel_photo_is_resampled_from_a_quarter_of_its_sides() -> None:
    data = encoded(textured(4032, 3024), "JPEG", quality=90)
    shown = preprocess(224)
    assert decode_image(data, short_side_px=shown.decode_short_side_px).shape == (756, 1008, 3)
    assert differences(data, shown).mean() < 0.5
